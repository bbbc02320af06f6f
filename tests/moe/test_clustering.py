"""Splits are balanced, seeded, and find structure that is there."""

import pytest
import torch

from d2dmoe_pl import plugins
from d2dmoe_pl.moe import split as splits
from d2dmoe_pl.moe.clustering import ActivationProfile, balanced_kmeans, sample_signs

SPLITS = plugins.names(splits)


def planted(num_experts=4, size=6, dim=32):
    """Rows in ``num_experts`` tight groups, shuffled; the groups."""
    groups = (torch.arange(num_experts * size) % num_experts)[torch.randperm(num_experts * size)]
    centres = torch.randn(num_experts, dim)
    return centres[groups] + 0.05 * torch.randn(len(groups), dim), groups


def same_partition(one, other):
    return torch.equal(one[:, None] == one[None], other[:, None] == other[None])


@pytest.mark.parametrize("name", SPLITS)
class TestContract:
    def test_balanced_and_seeded(self, name):
        split = plugins.find(splits, name, "split")
        weight, profile = torch.randn(24, 5), torch.randn(24, 7)
        one, again = (split(weight, profile, 4, seed=3) for _ in range(2))
        assert torch.bincount(one).tolist() == [6] * 4
        assert torch.equal(one, again)
        assert torch.equal(split(weight, profile, 1, seed=3), torch.zeros(24, dtype=torch.int64))

    def test_says_whether_it_needs_a_profile(self, name):
        split = plugins.find(splits, name, "split")
        assert split.needs_profile == (name == "activation")
        if not split.needs_profile:
            assert len(split(torch.randn(24, 5), None, 4, seed=0)) == 24


def test_planted_groups_are_found_whatever_their_scale():
    rows, groups = planted()
    rows *= torch.rand(len(rows), 1) * 10 + 0.1
    assert same_partition(balanced_kmeans(rows, 4, seed=0), groups)


def test_profile_split_finds_neurons_that_fire_together():
    groups = torch.arange(24) % 4
    active = torch.rand(600, 4) < 0.3  # which group fires for which token
    activation = active[:, groups].float() * torch.rand(600, 24)
    profile = ActivationProfile(24, 64, torch.device("cpu"))
    profile.add(activation, sample_signs(0, 600, 64, seed=0))
    assert same_partition(balanced_kmeans(profile.sums, 4, seed=0), groups)


def test_projection_keeps_cosines():
    activation = (torch.rand(4000, 10) < torch.linspace(0.1, 0.6, 10)).float()
    profile = ActivationProfile(10, 768, torch.device("cpu"))
    profile.add(activation, sample_signs(0, 4000, 768, seed=0))
    exact = torch.nn.functional.normalize(activation.t(), dim=1)
    projected = torch.nn.functional.normalize(profile.sums, dim=1)
    assert (exact @ exact.t() - projected @ projected.t()).abs().max() < 0.15


def test_profile_does_not_depend_on_batching_or_order():
    samples = [torch.randn(n, 12) for n in (3, 5, 1, 4)]
    whole, parts = (ActivationProfile(12, 16, torch.device("cpu")) for _ in range(2))
    whole.add(torch.cat(samples), torch.cat([sample_signs(i, len(x), 16, 7) for i, x in enumerate(samples)]))
    for i in (2, 0, 3, 1):
        parts.add(samples[i], sample_signs(i, len(samples[i]), 16, 7))
    assert torch.equal(whole.sums, parts.sums)


def test_signs_are_signs_of_the_sample():
    signs = sample_signs(5, 100, 50, seed=1)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1
    assert torch.equal(signs, sample_signs(5, 100, 50, seed=1))
    assert not torch.equal(signs, sample_signs(6, 100, 50, seed=1))
    assert not torch.equal(signs, sample_signs(5, 100, 50, seed=2))
