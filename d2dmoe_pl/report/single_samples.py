"""Where compute goes in single samples: the share of experts that each token runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.adapters import MASK, NO_MASK, adapter_for, stream_of
from d2dmoe_pl.benchmark.scoring import placed
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.evaluation_mode import evaluating
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.expert_layer import ExpertLayer
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.phases import Phase
from d2dmoe_pl.weights_types import floating_type

ENOUGH_TOKENS = 8192  # to tell how busy experts are
BYTE_FOR_BLANK, BROKEN, PART = "\u0120", "\ufffd", "\u00b7"  # Ġ of tokenizers of bytes; of a character; shown for it
LONGEST = 4  # bytes of a character
MOST_BESIDE = 16  # tokens of a picture that are no patches, such as those for the class, and registers


@dataclass(frozen=True)
class SampleCompute:
    """One sample.

    Attributes:
        words: Its tokens as text; empty for a picture.
        picture: ``(H, W)`` or ``(H, W, 3)`` in [0, 1]; None for a text.
        shares: Of experts that each token runs, mean over layers; in a picture, rows of those of its patches.
        said: What the model says of it, and its label, where both have names.
    """

    words: Sequence[str]
    picture: Tensor | None
    shares: Sequence[Any]
    said: str


@torch.no_grad()
def expert_loads(phase: Phase, number: int) -> dict[str, list[float]]:
    """The share of tokens that run each expert, by layer, on some test samples.

    Args:
        phase: With its model and data, which is set up.
        number: Of samples; fewer, once every layer has seen ``ENOUGH_TOKENS``.
    """
    counts: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def count(name: str, mask: Tensor) -> None:
        counts[name] = counts.get(name, torch.zeros(mask.shape[1], device=mask.device)) + mask.sum(dim=0)
        tokens[name] = tokens.get(name, 0) + len(mask)

    layers = deciding_layers(phase).items()
    with evaluating(phase.model), hooked(layer.watch(partial(count, name)) for name, layer in layers):
        for batch in phase.data.drawn_loader("test", number) or ():
            phase.run_layers(_as_model(phase, batch))
            if min(tokens.values(), default=0) >= ENOUGH_TOKENS:
                break
    return {name: (count / tokens[name]).tolist() for name, count in counts.items()}


def deciding_layers(phase: Phase) -> dict[str, ExpertLayer]:
    """The layers that choose among their experts; those without a gate run all."""
    layers = expert_layers(phase.model).items()
    return {name: layer for name, layer in layers if not isinstance(layer, MoELayer) or layer.gate is not None}


@torch.no_grad()
def single_samples(phase: Phase, number: int) -> list[SampleCompute]:
    """The first test samples.

    Args:
        phase: With its model and data, which is set up.
        number: Of samples.
    """
    loader = phase.data.drawn_loader("test", number)
    masks: dict[str, Tensor] = {}
    found: list[SampleCompute] = []
    layers = deciding_layers(phase)
    streams = adapter_for(phase.model).streams(phase.model)

    def see(name: str, mask: Tensor) -> None:
        masks[name] = mask

    with evaluating(phase.model), hooked(layer.watch(partial(see, name)) for name, layer in layers.items()):
        for batch in loader or ():
            logits = phase.logits(_as_model(phase, batch))
            # those of the stream that the input's words and patches are in
            seen = [mask for name, mask in masks.items() if stream_of(streams, name)[1] in (MASK, NO_MASK)]
            if len({len(mask) for mask in seen}) == 1:  # projections of another width see the same tokens
                shares = torch.stack([mask.float().mean(dim=1) for mask in seen]).mean(dim=0)  # (N,)
                found += _of_batch(phase, batch, logits, _by_sample(batch, shares.cpu()))
    return found


def _as_model(phase: Phase, batch: Batch) -> Batch:
    """The batch where the model is, in its type: no trainer runs any more that would see to it."""
    return placed(batch, phase.device, floating_type(phase.model))


def _by_sample(batch: Batch, shares: Tensor) -> Sequence[Tensor]:
    """The shares ``(N,)`` of each sample's tokens; none where layers see something else than these."""
    size = len(batch["labels"])
    real = batch[MASK].bool() if MASK in batch else torch.ones(size, len(shares) // size, dtype=torch.bool)  # (B, L)
    if len(shares) == real.numel():
        shares = shares[real.flatten()]  # of models that take padding for text
    lengths = real.sum(dim=1).tolist()
    return shares.split(lengths) if sum(lengths) == len(shares) else ()


def _of_batch(phase: Phase, batch: Batch, logits: Tensor, shares: Sequence[Tensor]) -> list[SampleCompute]:
    data: Any = phase.data
    found = []
    for index, own in enumerate(shares):
        words: list[str] = []
        picture = None
        if isinstance(data, TokenizedData):
            ids, mask = batch["input_ids"][index], batch.get("attention_mask")
            ids = ids if mask is None else ids[mask[index].bool()]
            words = words_of(data.tokenizer, ids.tolist())
        elif "pixel_values" in batch:
            pixels = batch["pixel_values"][index]
            found_patches = patches(own, *pixels.shape[-2:])
            if found_patches is None:
                continue
            picture, own = _picture(pixels), found_patches
        found.append(SampleCompute(words, picture, own.tolist(), _said(phase, batch, logits, index)))
    return [sample for sample in found if sample.words or sample.picture is not None]


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as people read them; of several that are parts of one character, the last has it."""
    tokens = list(tokenizer.convert_ids_to_tokens(ids))
    if tokenizer.convert_tokens_to_string([BYTE_FOR_BLANK]).strip() == BYTE_FOR_BLANK:
        return tokens  # which are no bytes
    words, parts = [], []
    for token in tokens:
        parts.append(token)
        text = tokenizer.convert_tokens_to_string(parts)
        is_whole = BROKEN not in text or len(parts) == LONGEST
        words.append(text if is_whole else PART)
        parts = [] if is_whole else parts
    return words


def _said(phase: Phase, batch: Batch, logits: Tensor, index: int) -> str:
    """What the model says of a sample, beside its label."""
    if phase.task.head != "classification":
        return ""
    names = phase.task.label_names
    label = batch["labels"][index]
    of_label = names[int(label if label.dim() == 0 else label.argmax())]
    return f"{names[int(logits[index].argmax())]} (label: {of_label})"


def _picture(pixels: Tensor) -> Tensor:
    """Pixels ``(C, H, W)`` as people see them, ``(H, W)`` or ``(H, W, 3)`` in [0, 1]."""
    low, high = pixels.min(), pixels.max()
    seen = (pixels - low) / (high - low).clamp(min=1e-6)
    return seen[0] if len(seen) != 3 else seen.permute(1, 2, 0)


def patches(shares: Tensor, height: int, width: int) -> Tensor | None:
    """The shares of those tokens that are patches of a picture, ``(rows, columns)``.

    Args:
        shares: Of all tokens ``(L,)``, of which patches come last.
        height: Of the picture.
        width: Of the picture.

    Returns:
        Those of as many square patches as there can be; None where that would leave more tokens than classes and
        registers have.
    """
    side = next((side for side in range(1, min(height, width) + 1) if _fits(side, len(shares), height, width)), None)
    if side is None:
        return None
    rows, columns = height // side, width // side
    return shares[len(shares) - rows * columns :].unflatten(0, (rows, columns))


def _fits(side: int, tokens: int, height: int, width: int) -> bool:
    is_whole = height % side == 0 and width % side == 0
    return is_whole and 0 <= tokens - height // side * (width // side) <= MOST_BESIDE
