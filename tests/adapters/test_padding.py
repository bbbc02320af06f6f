"""The logits of a text depend neither on the side of its padding, nor on how much there is."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from d2dmoe_pl.adapters import adapter_for

TEXTS = [kind for kind in tiny.SOURCES if tiny.is_of_texts(kind)]
LENGTHS = (7, 4, 1)


def padded(texts, in_front, behind, fill=0):
    """A batch with margins in front of the longest text and behind it, and shorter texts anywhere between."""
    rows, masks = [], []
    for i, text in enumerate(texts):
        spare = max(LENGTHS) - len(text)
        left = spare if in_front > behind else 0 if in_front == 0 else spare // 2 * (i % 2)
        margin = (in_front + left, behind + spare - left)
        rows.append(F.pad(text, margin, value=fill))
        masks.append(F.pad(torch.ones_like(text), margin))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def with_answers(kind, batch):
    """The batch, for a model that answers texts with the beginning of an answer to each."""
    if tiny.TASKS[kind] != "text-to-text":
        return batch
    return {**batch, "decoder_input_ids": torch.tensor([[0, 7, 9]] * len(batch["input_ids"]))}


def texts_for(kind):
    """Texts of different lengths; where a head reads the token that ends a text, there is one."""
    texts = [torch.randint(5, 40, (length,)) for length in LENGTHS]
    if tiny.family_of(kind) in tiny.ENCODER_DECODERS:
        for text in texts:
            text[-1] = 2
    return texts


def by_text(kind, model, batch):
    """The logits of each text, without those of padding; and the hidden states."""
    adapter, whole = adapter_for(model), with_answers(kind, batch)
    logits, states = adapter.logits_and_hidden_states(model, whole)
    torch.testing.assert_close(adapter.logits(model, whole), logits)
    mask = batch["attention_mask"].bool()
    if tiny.TASKS[kind] == "text-to-text":
        return list(logits), []
    rows = [
        one[:, real] if tiny.TASKS[kind] == "question-answering" else one[real] if logits.dim() == 3 else one
        for one, real in zip(logits, mask, strict=True)
    ]
    behind = tiny.family_of(kind) in tiny.ENCODER_DECODERS  # whose states are in the order that the model has seen
    return rows, [] if behind else [states[1][i][real] for i, real in enumerate(mask)]


@pytest.mark.parametrize("make", [tiny.dense, tiny.routed], ids=["dense", "routed"])
@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_padding_makes_no_difference(kind, make):
    model = make(kind).eval()
    fill = model.config.pad_token_id or 0
    texts = texts_for(kind)
    expected, expected_states = by_text(kind, model, padded(texts, 0, 0, fill))
    for in_front, behind in ((1, 0), (3, 0), (0, 3), (2, 1)):
        got, states = by_text(kind, model, padded(texts, in_front, behind, fill))
        for one, other in zip([*got, *states], [*expected, *expected_states], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for text, one in zip(texts, expected, strict=True):  # nor does its company
        alone = {"input_ids": text[None], "attention_mask": torch.ones_like(text)[None]}
        torch.testing.assert_close(by_text(kind, model, alone)[0][0], one, rtol=1e-5, atol=1e-5)
