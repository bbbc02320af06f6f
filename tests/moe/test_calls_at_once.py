"""Each call of a model knows its own tokens: in threads, replicas, nested and compiled calls, and run once more."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from d2dmoe_pl.moe.find_layers import moe_layers

MODELS = {
    "bert": lambda: tiny.routed("bert", tau=0.3),
    "gpt2": lambda: tiny.routed("gpt2", tau=0.3),
    "moebert": tiny.moebert,
}


def batches(number):
    """Batches of other sizes, lengths and padding each."""
    made = []
    for seed in range(number):
        drawn = torch.Generator().manual_seed(seed)
        size, length = (int(torch.randint(1, 6, (), generator=drawn)) for _ in range(2))
        ids = torch.randint(3, 40, (size, length + 1), generator=drawn)
        real = torch.randint(1, length + 2, (size, 1), generator=drawn)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(length + 1) < real).long()})
    return made


@torch.no_grad()
def answers(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("kind", list(MODELS))
def test_threads_get_what_one_gets(kind):
    calls, threads = 40, 8
    model, inputs = MODELS[kind]().eval(), batches(23)
    expected = [answers(model, each) for each in inputs]
    together = threading.Barrier(threads)

    def many(first):
        together.wait()
        numbers = [(first + call) % len(inputs) for call in range(calls)]
        return sum(not torch.equal(answers(model, inputs[number]), expected[number]) for number in numbers)

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(many, range(threads))) == [0] * threads


def test_replicas_that_share_hooks_and_context():
    model, inputs = tiny.routed("bert", tau=0.3).eval(), batches(4)
    expected = [answers(model, each) for each in inputs]

    def replica():  # as torch.nn.DataParallel makes them, on whatever device
        twins = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
        for module in model.modules():
            twin = twins[id(module)]
            twin._modules = {name: twins[id(child)] for name, child in module._modules.items() if child is not None}
            twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        return twins[id(model)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: answers(replica(), each), inputs * 10))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 10, strict=True))


def test_nested_calls():
    outer, inner, inputs = tiny.routed("bert", tau=0.3).eval(), tiny.routed("bert", tau=0.3).eval(), batches(3)
    expected = answers(outer, inputs[0])
    alone = [answers(model, inputs[1]) for model in (inner, outer)]
    found = []
    last = list(moe_layers(outer).values())[-1]
    calls = []

    def within(layer, args):
        if not calls:
            calls.append(None)
            found.extend(answers(model, inputs[1]) for model in (inner, outer))  # another model, and itself

    last.register_forward_pre_hook(within)
    assert torch.equal(answers(outer, inputs[0]), expected)
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_a_call_that_fails_within_another():
    outer, inputs = tiny.routed("bert", tau=0.3).eval(), batches(3)
    expected, calls = answers(outer, inputs[0]), []

    def within(layer, args):
        if not calls:
            calls.append(None)
            with pytest.raises(ValueError, match="must be"):
                outer(inputs[1]["input_ids"], inputs[1]["attention_mask"][None])

    next(iter(moe_layers(outer).values())).register_forward_pre_hook(within)
    assert torch.equal(answers(outer, inputs[0]), expected)


@pytest.mark.thorough
def test_compiled_and_in_threads():
    model, inputs = tiny.routed("bert", tau=0.3).eval(), batches(6)
    expected = [answers(model, each) for each in inputs]
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for each, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(answers(compiled, each), wanted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: answers(compiled, each), inputs * 4))
    for one, other in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(one, other)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "moebert"])
def test_gradient_checkpointing_with_padding(kind, use_reentrant):
    model, inputs = MODELS[kind](), batches(3)[2]
    assert int(inputs["attention_mask"].sum()) < inputs["attention_mask"].numel()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, inputs)
    if use_reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_checkpointing_by_other_means_is_refused_rather_than_wrong():
    model, inputs = tiny.routed("bert", tau=0.3).train(), batches(3)[2]
    layer = model.bert.encoder.layer[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with pytest.raises(RuntimeError, match=r"which tokens are padding is not known there; must be by"):
        gradients(model, inputs)
