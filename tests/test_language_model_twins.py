"""The script of what else makes a language model cheaper: all of it is the dense model, half of it costs half."""

import language_model_twins as twins
import pytest
import tiny
import torch

from d2dmoe_pl.moe.find_layers import select_ffns


@pytest.fixture
def model():
    return tiny.dense("llama", "silu").eval()


@torch.no_grad()
def outputs(model, method):
    """Of the first FFN: what a method makes of random tokens, and what the dense one does."""
    ffn = select_ffns(model)[0]
    x = torch.randn(20, ffn.d_model, generator=torch.Generator().manual_seed(0))
    return method(ffn, x)(x), model.get_submodule(ffn.name)(x)


@pytest.mark.parametrize("by_weight", [False, True])
def test_with_everything_they_are_the_dense_layer(model, by_weight):
    for method in (
        lambda ffn, x: twins.cats(1.0, ffn, x),
        lambda ffn, x: twins.sparse_inputs(1.0, 1.0, by_weight, ffn, x),
    ):
        torch.testing.assert_close(*outputs(model, method))


def test_shares_of_inputs_cost_what_was_asked_for():
    for share in twins.SHARES:
        pairs = list(twins.input_shares(share))
        assert len(pairs) > 2
        assert all((2 * into + out_of) / 3 == pytest.approx(share) for into, out_of in pairs)


def test_clusters_are_equally_large_and_the_nearest_where_there_is_room():
    cost = torch.rand(24, 4, generator=torch.Generator().manual_seed(0))
    member = twins.balanced(cost, size=6)
    assert torch.bincount(member).tolist() == [6] * 4
    surest = cost.amin(dim=1).argmin()
    assert member[surest] == cost[surest].argmin()


def test_cmoe_runs_shared_experts_for_all_tokens_and_as_many_neurons_as_it_may(model):
    ffn = select_ffns(model)[0]
    x = torch.randn(64, ffn.d_model, generator=torch.Generator().manual_seed(0))
    forward = twins.cmoe(0.5, ffn, x, num_experts=8)
    ran = []
    handle = ffn.down.register_forward_pre_hook(lambda _, args: ran.append(args[0] != 0))
    with torch.no_grad():
        forward(x)
    handle.remove()
    assert ran[0].float().mean() <= 0.5
    assert ran[0].all(dim=0).sum() >= 2 * ffn.d_ff // 8
