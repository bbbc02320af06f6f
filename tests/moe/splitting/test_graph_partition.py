"""The co-activation graph is cut where it is thin, into exactly equal parts, with METIS or without."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe_pl.moe.splitting import _graph_partition as graph_partition
from d2dmoe_pl.moe.splitting._graph_partition import balance, balanced_partition, has_metis, kept_share

METIS = pytest.param(True, marks=pytest.mark.skipif(not has_metis(), reason="pymetis has no wheel for this platform"))


@pytest.fixture(params=[METIS, False], ids=["metis", "without"])
def partition(request, monkeypatch):
    """:func:`balanced_partition`, with METIS or without."""
    monkeypatch.setattr(graph_partition, "has_metis", lambda: request.param)
    return balanced_partition


def graph(groups, inside=1.0, between=0.2):
    """Random edge weights of nodes in ``groups``, heavier inside a group."""
    same = groups[:, None] == groups[None]
    weight = torch.randint(0, 100, (len(groups), len(groups))) * torch.where(same, inside, between)
    return (weight + weight.t()).floor()


def test_beats_random_parts_and_finds_planted_ones(partition):
    groups = (torch.arange(96) % 8)[torch.randperm(96)]
    weight = graph(groups, between=0.5)
    found = partition(weight, 8, seed=0)
    random = [kept_share(weight, groups[torch.randperm(96)]) for _ in range(20)]
    assert kept_share(weight, found) > 1.3 * max(random)
    easy = partition(graph(groups, between=0.05), 8, seed=0)
    assert torch.equal(easy[:, None] == easy[None], groups[:, None] == groups[None])


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_parts_are_equal_for_any_graph(num_parts, size, density, seed):
    generator = torch.Generator().manual_seed(seed)
    nodes = num_parts * size
    weight = torch.rand(nodes, nodes, generator=generator)
    weight = torch.where(weight < density, (1000 * weight).floor(), 0.0)
    found = balanced_partition(weight + weight.t(), num_parts, seed=0)
    assert torch.bincount(found, minlength=num_parts).tolist() == [size] * num_parts


def test_weights_beyond_32_bits(partition):
    groups = torch.arange(24) % 4
    found = partition(graph(groups) * 1e9, 4, seed=0)
    assert torch.equal(found[:, None] == found[None], groups[:, None] == groups[None])


def test_balancing_moves_the_least_attached_first():
    weight = np.zeros((6, 6))
    for one, other, value in ((0, 1, 9), (0, 2, 9), (1, 2, 9), (2, 3, 1), (3, 4, 5), (3, 5, 4)):
        weight[one, other] = weight[other, one] = value
    # node 3 hangs on the first part by 1, and on the second by 9
    assert balance(weight, np.array([0, 0, 0, 0, 1, 1]), 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert np.bincount(balance(weight, np.zeros(6, dtype=np.int64), 3)).tolist() == [2, 2, 2]


def test_kept_share_is_that_of_a_loop():
    weight, part = graph(torch.arange(12) % 3), torch.arange(12) % 4
    edges = [(i, j) for i in range(12) for j in range(i)]
    inside = sum(weight[i, j].item() for i, j in edges if part[i] == part[j])
    assert kept_share(weight, part) == pytest.approx(inside / sum(weight[i, j].item() for i, j in edges))
    assert kept_share(torch.zeros(12, 12), part) == 1


def test_that_metis_is_missing_is_said_once(monkeypatch):
    monkeypatch.setattr(graph_partition.importlib.util, "find_spec", lambda name: None)
    has_metis.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pymetis is not installed, so .* balanced k-means of its rows instead"):
            balanced_partition(graph(torch.arange(8) % 2), 2, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            balanced_partition(graph(torch.arange(8) % 2), 2, seed=0)
    finally:
        has_metis.cache_clear()
