"""Experts from importance, against a plain loop over tokens."""

import copy

import pytest
import tiny
import torch
from torch.nn import functional as F

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moebert.experts import ImportanceExperts, check_expert_sizes, expert_neurons


def test_neurons_by_hand():
    importance = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.8, 0.2, 0.7, 0.6, 0.0])
    # in order: 1, 4, 6, 7, 2, 3, 5, 0, 8
    assert expert_neurons(importance, 2, 4, 2).tolist() == [[1, 4, 6, 2], [1, 4, 7, 3]]
    assert expert_neurons(importance, 3, 3, 0).tolist() == [[1, 7, 5], [4, 2, 0], [6, 3, 8]]
    assert expert_neurons(importance, 2, 3, 3).tolist() == [[1, 4, 6], [1, 4, 6]]


@pytest.mark.parametrize(("experts", "dim", "shared"), [(4, 768, 512), (5, 7, 3), (1, 9, 4), (3, 5, 0)])
def test_shared_and_dealt_neurons(experts, dim, shared):
    importance = torch.rand(3072)
    neurons = expert_neurons(importance, experts, dim, shared)
    assert neurons.shape == (experts, dim)
    best = importance.argsort(descending=True)
    assert neurons.unique().numel() == shared + experts * (dim - shared)
    assert set(neurons.flatten().tolist()) == set(best[: neurons.unique().numel()].tolist())
    assert all(row[:shared].tolist() == best[:shared].tolist() for row in neurons)


def test_sizes():
    check_expert_sizes(4, 768, 512, 3072, "x")
    check_expert_sizes(4, 12, 0, 48, "x")
    message = (
        r"num_experts=4, expert_dim=768, num_shared=512: need 1536 neurons \(num_shared \+ num_experts \* "
        r"\(expert_dim - num_shared\)\), but x has 1535"
    )
    with pytest.raises(ConfigError, match=message):
        check_expert_sizes(4, 768, 512, 1535, "x")


def made(dropout=0.0):
    ffn = select_ffns(tiny.dense("bert", "gelu"))[0]
    with torch.no_grad():
        ffn.residual_norm.weight.add_(0.5)
    neurons = expert_neurons(torch.rand(tiny.WIDTH), 4, 12, 5)
    return ffn, neurons, ImportanceExperts(ffn, neurons, dropout).eval()


def naive(ffn, neurons, tokens, expert, scale=None):
    """Each token through a dense FFN of its expert's neurons."""
    rows = []
    for token, chosen, factor in zip(tokens, expert, [1.0] * len(tokens) if scale is None else scale, strict=True):
        index = neurons[chosen]
        hidden = ffn.activation(F.linear(token, ffn.up.weight[index], ffn.up.bias[index]))
        output = F.linear(hidden, ffn.down.weight[:, index], ffn.down.bias)
        rows.append(ffn.residual_norm(token + factor * output))
    return torch.stack(rows)


@pytest.mark.parametrize("expert", [[0, 3, 1, 1, 0, 2, 3], [2] * 7, [0, 3, 3, 0, 0, 3, 0]])
@pytest.mark.parametrize("scaled", [False, True])
def test_outputs_and_gradients_equal_a_loop_over_tokens(expert, scaled):
    ffn, neurons, experts = made()
    expert, scale = torch.tensor(expert), torch.rand(7, 1) if scaled else None
    tokens = torch.randn(7, 24, requires_grad=True)
    got, expected = experts(tokens, expert, scale), naive(ffn, neurons, tokens, expert, scale)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.square().sum(), tokens, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), tokens)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_gradients_reach_chosen_experts_only():
    _, _, experts = made()
    experts(torch.randn(3, 24), torch.tensor([1, 3, 1])).square().sum().backward()
    for name, parameter in experts.named_parameters():
        reached = parameter.grad.flatten(1).abs().sum(dim=1) > 0
        assert reached.tolist() == [False, True, False, True], name


def test_one_expert_of_all_neurons_is_the_dense_ffn():
    ffn, _, _ = made()
    experts = ImportanceExperts(ffn, expert_neurons(torch.rand(tiny.WIDTH), 1, tiny.WIDTH, 0), 0.0)
    tokens = torch.randn(5, 24)
    dense = ffn.residual_norm(tokens + ffn.down(ffn.activation(ffn.up(tokens))))
    torch.testing.assert_close(experts(tokens, torch.zeros(5, dtype=torch.int64)), dense, rtol=1e-5, atol=1e-6)


def test_dropout_in_training_only():
    _, _, experts = made(dropout=0.5)
    tokens, expert = torch.randn(5, 24), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(experts(tokens, expert), experts(tokens, expert))
    trained = copy.deepcopy(experts).train()
    assert not torch.equal(trained(tokens, expert), experts(tokens, expert))


def test_no_tokens():
    _, _, experts = made()
    assert experts(torch.zeros(0, 24), torch.zeros(0, dtype=torch.int64)).shape == (0, 24)
