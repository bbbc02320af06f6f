"""A model that takes from its blocks what they gave before says what it says when it is run whole."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2dmoe_pl.moe.budgets.block_replay import BlockReplay
from d2dmoe_pl.moe.find_layers import moe_layers

FAMILIES = ["timm_vit", "bert", "distilbert", "gpt2", "llama", "gemma-3", "vit", "deit"]


def at(model, taus):
    for layer, tau in zip(moe_layers(model).values(), taus, strict=True):
        layer.gate.set_tau(tau)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_equals_a_whole_run(kind):
    model = tiny.routed(kind)
    batches = {"a": tiny.batch(kind), "b": tiny.batch(kind, 5)}
    replay = BlockReplay(model, list(moe_layers(model)))
    skipped = []
    for taus in ([1.0, 1.0], [1.0, 0.5], [1.0, 0.2], [0.3, 0.2], [0.3, 0.2], [0.0, 0.0]):
        at(model, taus)
        for name, batch in batches.items():
            with replay.running(name, taus) as still:
                got = tiny.logits_of_tokens(model, batch)
            assert torch.equal(got, tiny.logits_of_tokens(model, batch))
            skipped.append(still)
    assert skipped[::2] == [0, 1, 1, 0, 1, 0]
    assert skipped[1::2] == skipped[::2]


def test_a_call_that_is_broken_off_leaves_nothing_behind():
    model = tiny.routed()
    batch = tiny.batch()
    replay = BlockReplay(model, list(moe_layers(model)))
    with replay.running(0, [0.5, 0.5]):
        expected = tiny.logits(model, batch)
    with pytest.raises(KeyboardInterrupt), replay.running(0, [0.5, 0.1]):
        raise KeyboardInterrupt
    with replay.running(0, [0.5, 0.5]) as still:
        assert torch.equal(tiny.logits(model, batch), expected)
    assert still == 0
    assert not any("forward" in vars(block) or block._forward_hooks for block in model.blocks)


@given(st.lists(st.lists(st.sampled_from([0.1, 0.6]), min_size=2, max_size=2), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_any_order_of_settings(order):
    model, batch = tiny.routed("bert"), tiny.batch("bert")
    replay = BlockReplay(model, list(moe_layers(model)))
    for taus in order:
        at(model, taus)
        with replay.running(0, taus):
            got = tiny.logits(model, batch)
        assert torch.equal(got, tiny.logits(model, batch))


class InTurns(nn.Module):
    """Runs its two blocks twice, one after the other."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([tiny.routed("bert").bert.encoder.layer[0].intermediate for _ in range(2)])

    def forward(self, x):
        for block in (*self.blocks, *self.blocks):
            x = x + block(x)
        return x


@torch.no_grad()
def test_blocks_that_run_in_turns_are_run_each_time():
    model, x = InTurns(), torch.randn(2, 5, 24)
    replay = BlockReplay(model, list(moe_layers(model)))
    for taus in ([1.0, 1.0], [1.0, 0.2], [1.0, 0.0], [0.3, 0.0]):
        at(model, taus)
        with replay.running(0, taus) as still:
            got = model(x)
        assert torch.equal(got, model(x))
        assert still == 0


@torch.no_grad()
def test_layers_in_no_list_are_run_each_time():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    replay = BlockReplay(model, ["a"])
    for _ in range(2):
        with replay.running(0, [1.0]) as still:
            model["a"](torch.ones(2))
        assert still == 0
