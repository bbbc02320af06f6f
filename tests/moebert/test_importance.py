"""Importance scores against per-sample autograd."""

import pytest
import timm
import tiny
import torch
import transformers
from torch.nn import functional as F

from d2dmoe_pl.adapters import TransposedLinear
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moebert.importance import Importance


def gradient(projection):
    """Of the weight, ``(out, in)``."""
    transposed = isinstance(projection, TransposedLinear)
    return projection.module.weight.grad.t() if transposed else projection.weight.grad


def naive(model, inputs):
    """One backward pass a sample, padding cut off, gradients of the weights themselves."""
    ffns = select_ffns(model)
    scores = {ffn.name: torch.zeros(ffn.d_ff) for ffn in ffns}
    mask = inputs.get("attention_mask")
    for row in range(len(inputs["labels"])):
        length = None if mask is None else int(mask[row].sum())
        one = {
            key: value[row : row + 1, :length] if key in ("input_ids", "attention_mask") else value[row : row + 1]
            for key, value in inputs.items()
        }
        model.zero_grad()
        F.cross_entropy(tiny.logits(model, one), one["labels"]).backward()
        for ffn in ffns:
            up = (ffn.up.weight * gradient(ffn.up)).sum(dim=1)
            down = (ffn.down.weight * gradient(ffn.down)).sum(dim=0)
            scores[ffn.name] += (up + down).abs()
    return {name: score.detach() for name, score in scores.items()}


def scored(model, inputs, batch_size=None, samples=None):
    importance = Importance(select_ffns(model), torch.device("cpu"))
    size = batch_size or len(inputs["labels"])
    for start in range(0, len(inputs["labels"]), size):
        part = {key: value[start : start + size] for key, value in inputs.items()}
        importance.add(
            lambda part=part: F.cross_entropy(tiny.logits(model, part), part["labels"], reduction="sum"),
            lambda name, part=part: part.get("attention_mask"),
            torch.ones(len(part["labels"]), dtype=torch.bool) if samples is None else samples,
        )
    return importance.scores


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "vit", "timm_vit"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_one_backward_pass_a_sample(kind, activation):
    model = tiny.dense(kind, activation)
    inputs = tiny.batch(kind, size=6)
    scores, expected = scored(model, inputs), naive(model, inputs)
    assert list(scores) == list(expected)
    for name, score in scores.items():
        assert score.max() > 0
        torch.testing.assert_close(score.float(), expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].max()))


def shared_layers():
    """A model whose one layer runs three times."""
    shape = {**tiny.SHAPE, "num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.AlbertConfig(**shape, embedding_size=12, vocab_size=40, num_labels=4)
    return transformers.AlbertForSequenceClassification(config)


def branches():
    """A model whose FFNs lie in branches beside each other."""
    config = {"img_size": 240, "embed_dim": (8, 16), "num_heads": (1, 2), "mlp_ratio": (2.0, 2.0, 1.0), "depth": None}
    sizes = {key: value for key, value in config.items() if value is not None}
    return timm.create_model("crossvit_9_240", in_chans=1, num_classes=4, **sizes)


@pytest.mark.parametrize("make", [shared_layers, branches])
def test_layers_that_run_again_or_beside_each_other(make):
    torch.manual_seed(0)
    model = make().eval()
    tiny._spread(model)
    inputs = (
        {"pixel_values": torch.randn(2, 1, 240, 240), "labels": torch.tensor([1, 2])}
        if make is branches
        else tiny.batch("bert", size=4)
    )
    scores, expected = scored(model, inputs), naive(model, inputs)
    assert list(scores) == list(expected)
    for name, score in scores.items():
        assert score.max() > 0
        torch.testing.assert_close(score.float(), expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].max()))


def test_small_gradients_are_none_in_float16_and_some_here():
    model, inputs = tiny.dense("bert"), tiny.batch("bert", size=4)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-7)
    expected = scored(model, inputs)
    with torch.autocast("cpu", torch.float16):
        found = scored(model, inputs)
    for name, score in found.items():
        assert score.max() > 0
        torch.testing.assert_close(score, expected[name])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_same_at_any_batch_size(batch_size):
    model, inputs = tiny.dense("bert", "gelu"), tiny.batch("bert", size=6)
    whole, parts = scored(model, inputs), scored(model, inputs, batch_size)
    for name, score in whole.items():
        torch.testing.assert_close(parts[name], score, rtol=1e-5, atol=1e-6 * float(score.max()))


def test_each_stack_has_its_own_padding():
    model = tiny.dense("t5-text-to-text")
    masks = {"encoder": torch.ones(4, 7, dtype=torch.long), "decoder": torch.ones(4, 5, dtype=torch.long)}
    masks["encoder"][1:, 4:] = masks["decoder"][:3, 3:] = 0
    labels = torch.randint(3, 40, (4, 5)).masked_fill(masks["decoder"] == 0, -100)
    inputs = {"input_ids": torch.randint(3, 40, (4, 7)), "labels": labels}

    def scores(parts):
        importance = Importance(select_ffns(model), torch.device("cpu"))
        for part in parts:
            given = {key: value[part] for key, value in inputs.items()}
            own = {name: mask[part] for name, mask in masks.items()}
            predicted = (given["labels"] != -100).sum()
            importance.add(
                lambda given=given, own=own, predicted=predicted: (
                    model(**given, attention_mask=own["encoder"]).loss * predicted
                ),
                lambda name, own=own: own[name.split(".")[0]],
                torch.ones(len(given["labels"]), dtype=torch.bool),
            )
        return importance.scores

    whole, single = scores([slice(0, 4)]), scores([slice(i, i + 1) for i in range(4)])
    assert {name.split(".")[0] for name in whole} == {"encoder", "decoder"}
    for name, score in whole.items():
        torch.testing.assert_close(single[name], score, rtol=1e-4, atol=1e-5 * float(score.max()))


def test_samples_that_do_not_count():
    model, inputs = tiny.dense("bert"), tiny.batch("bert", size=4)
    first = {key: value[:2] for key, value in inputs.items()}
    got = scored(model, inputs, samples=torch.tensor([True, True, False, False]))
    for name, score in scored(model, first).items():
        torch.testing.assert_close(got[name], score, rtol=1e-5, atol=1e-6 * float(score.max()))


def test_no_gradient_of_a_weight_is_computed():
    model, inputs = tiny.dense("bert"), tiny.batch("bert")
    scored(model, inputs)
    assert all(parameter.grad is None for parameter in model.parameters())
