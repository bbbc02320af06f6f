"""Splits are balanced, seeded, and find structure that is there."""

import pytest
import torch

from d2dmoe_pl.moe.splitting import SPLITS
from d2dmoe_pl.moe.splitting import _firing_statistics as firing
from d2dmoe_pl.moe.splitting._balanced_kmeans import balanced_kmeans

BY_ACTIVATION = ["activation", "coactivation"]


def tokens(count, dim=64, sample=0, seed=0):
    """``count`` tokens of one sample."""
    return firing.CountedTokens([(sample, count)], dim, seed, torch.device("cpu"))


def statistic(split, activation):
    """What ``split`` is given about ``activation``, ``(N, d_ff)``."""
    return split.statistic(activation, tokens(len(activation))) if split.needs_activations else None


def planted(num_experts=4, size=6, dim=32):
    """Rows in ``num_experts`` tight groups, shuffled; the groups."""
    groups = (torch.arange(num_experts * size) % num_experts)[torch.randperm(num_experts * size)]
    centres = torch.randn(num_experts, dim)
    return centres[groups] + 0.05 * torch.randn(len(groups), dim), groups


def firing_together(groups, num_tokens=600):
    """Activations ``(N, d_ff)`` of neurons that fire when their group does."""
    active = torch.rand(num_tokens, int(groups.max()) + 1) < 0.3  # which group fires for which token
    return active[:, groups].float() * torch.rand(num_tokens, len(groups))


def same_partition(one, other):
    return torch.equal(one[:, None] == one[None], other[:, None] == other[None])


@pytest.mark.parametrize("name", SPLITS.names())
class TestContract:
    def test_balanced_and_seeded(self, name):
        split = SPLITS.find(name, "split")
        weight, given = torch.randn(24, 5), statistic(split, torch.randn(50, 24).relu())
        one, again = (split(weight, given, 4, seed=3) for _ in range(2))
        assert torch.bincount(one).tolist() == [6] * 4
        assert torch.equal(one, again)
        assert torch.equal(split(weight, given, 1, seed=3), torch.zeros(24, dtype=torch.int64))

    def test_balanced_with_as_many_experts_as_neurons(self, name):
        split = SPLITS.find(name, "split")
        found = split(torch.randn(24, 5), statistic(split, torch.randn(50, 24).relu()), 24, seed=0)
        assert sorted(found.tolist()) == list(range(24))

    def test_says_what_it_is_given(self, name):
        split = SPLITS.find(name, "split")
        assert split.needs_activations == (name in BY_ACTIVATION)

    def test_neurons_that_never_fire(self, name):
        split = SPLITS.find(name, "split")
        activation = torch.randn(50, 24).relu() * (torch.arange(24) < 9)
        for fired in (activation, activation * 0):
            assert torch.bincount(split(torch.randn(24, 5), statistic(split, fired), 4, seed=0)).tolist() == [6] * 4


@pytest.mark.parametrize("name", BY_ACTIVATION)
def test_neurons_that_fire_together_are_found(name):
    split = SPLITS.find(name, "split")
    groups = (torch.arange(24) % 4)[torch.randperm(24)]
    given = statistic(split, firing_together(groups))
    assert same_partition(split(torch.randn(24, 5), given, 4, seed=0), groups)


@pytest.mark.parametrize("name", BY_ACTIVATION)
def test_statistics_do_not_depend_on_batching_or_order(name):
    statistic = SPLITS.find(name, "split").statistic
    samples = [torch.randn(n, 12) for n in (3, 5, 1, 4)]
    together = firing.CountedTokens([(i, len(x)) for i, x in enumerate(samples)], 16, 7, torch.device("cpu"))
    whole = statistic(torch.cat(samples), together)
    parts = [statistic(samples[i], tokens(len(samples[i]), 16, i, 7)) for i in (2, 0, 3, 1)]
    assert torch.equal(whole, sum(parts))
    nothing = firing.CountedTokens((), 16, 7, torch.device("cpu"))
    assert torch.equal(statistic(torch.zeros(0, 12), nothing), torch.zeros_like(whole))


def test_planted_groups_are_found_whatever_their_scale():
    rows, groups = planted()
    rows *= torch.rand(len(rows), 1) * 10 + 0.1
    assert same_partition(balanced_kmeans(rows, 4, seed=0), groups)


def test_projection_keeps_cosines():
    activation = (torch.rand(4000, 10) < torch.linspace(0.1, 0.6, 10)).float()
    profile = firing.profile(activation, tokens(4000, 768))
    exact = torch.nn.functional.normalize(activation.t(), dim=1)
    projected = torch.nn.functional.normalize(profile, dim=1)
    assert (exact @ exact.t() - projected @ projected.t()).abs().max() < 0.15


def test_coactivation_equals_its_naive_twin():
    activation = torch.randn(30, 6)
    activation[3] = -1.0  # a token for which nothing fires
    expected = torch.zeros(6, 6)
    for row in activation.tolist():
        levels = [next(q for q in range(5) if max(value, 0) <= max(row) * q / 4 or max(row) <= 0) for value in row]
        for i in range(6):
            for j in range(6):
                expected[i, j] += levels[i] * levels[j]
    assert torch.equal(firing.coactivation(activation, tokens(30)), expected)


def test_coactivation_counts_how_often_and_how_strongly():
    often = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    weak = torch.tensor([[1.0, 0.2, 0.0]] * 3)
    seldom = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    weights = [firing.coactivation(activation, tokens(3))[0, 1] for activation in (often, weak, seldom)]
    assert weights[0] > weights[1] > 0
    assert weights[0] > weights[2] > 0
    assert firing.coactivation(often, tokens(3))[0, 2] == 0


def test_signs_are_signs_of_the_sample():
    signs = firing.sample_signs(5, 100, 50, seed=1)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1
    assert torch.equal(signs, firing.sample_signs(5, 100, 50, seed=1))
    assert not torch.equal(signs, firing.sample_signs(6, 100, 50, seed=1))
    assert not torch.equal(signs, firing.sample_signs(5, 100, 50, seed=2))
