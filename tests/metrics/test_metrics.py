"""The metrics against counts by hand; sums do not depend on how data is cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe_pl.metrics.activation_sparsity import ActivationSparsity, sparsity_counts
from d2dmoe_pl.metrics.expert_load import ExpertLoad, executed_pairs, experts_histogram
from d2dmoe_pl.metrics.model_cost import ModelCost


def test_histogram_by_hand():
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    assert experts_histogram(mask).tolist() == [0, 2, 1, 0]
    assert executed_pairs(experts_histogram(mask)) == 4


@given(st.integers(0, 20), st.integers(1, 9), st.integers(0, 2**31))
@settings(deadline=None)
def test_load_adds_up(tokens, experts, seed):
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < 0.4
    load = ExpertLoad([experts, 3])
    for part in mask.tensor_split(3):
        load.update(0, part)
        load.update_work(0, part.sum(dim=1) / 2)
    first, untouched = load.compute()
    assert torch.equal(first.histogram, experts_histogram(mask))
    assert executed_pairs(first.histogram) == mask.sum()
    assert first.work == mask.sum() / 2
    assert untouched.histogram.tolist() == [0] * 4
    assert untouched.work == 0


def test_sparsity_by_hand():
    activation = torch.tensor([[0.0, 1.0, 0.05, 0.005], [10.0, 0.0, 0.0, 0.5]])
    assert sparsity_counts(activation).tolist() == [3, 6, 4, 3]
    assert sparsity_counts(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [3, 3, 3, 3]  # a token with nothing too
    metric = ActivationSparsity(["a", "b"])
    metric.update("a", activation[:1])
    metric.update("a", activation[1:])
    shares = metric.compute()
    assert shares["zeros"]["a"] == 3 / 8
    assert shares["below_0.1"]["a"] == 6 / 8
    assert shares["zeros"]["b"] == 0


def test_model_cost_keeps_large_sums_exact():
    cost = ModelCost()
    cost.update([2**60, 1])
    cost.update([1])
    assert cost.compute() == (3, 2**60 + 2)
