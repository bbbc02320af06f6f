"""The contract of every gating rule, and what each rule is on its own."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.gating import GATING_RULES, Gate, GateConfig

RULES = GATING_RULES.names()
taus = st.floats(0.0, 1.0)


@st.composite
def scores(draw):
    tokens, experts = draw(st.integers(0, 9)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(tokens, experts, generator=generator)
    return torch.where(values < draw(st.floats(0, 1)), 0.0, values)  # zeros and ties, as after ReLU


def gate(rule, tau):
    return Gate(GateConfig(rule, tau))


def test_the_rules_of_the_papers_are_there():
    assert RULES == ["dynk_cumulative", "dynk_max", "topk"]


@pytest.mark.parametrize("rule", RULES)
class TestContract:
    @given(scores())
    @settings(deadline=None, max_examples=50)
    def test_tau_one_runs_everything(self, rule, values):
        assert gate(rule, 1.0)(values).all()

    @given(scores(), taus, taus)
    @settings(deadline=None, max_examples=50)
    def test_larger_tau_never_runs_fewer_and_keeps_what_ran(self, rule, values, one, other):
        low, high = (gate(rule, tau)(values) for tau in sorted((one, other)))
        assert (low <= high).all()

    @given(scores(), taus)
    @settings(deadline=None, max_examples=50)
    def test_shape_dtype_and_at_least_one_expert(self, rule, values, tau):
        mask = gate(rule, tau)(values)
        assert mask.shape == values.shape
        assert mask.dtype == torch.bool
        assert mask.any(dim=1).all()

    @given(scores(), taus)
    @settings(deadline=None, max_examples=50)
    def test_tokens_do_not_see_each_other(self, rule, values, tau):
        together = gate(rule, tau)(values)
        alone = [gate(rule, tau)(row[None])[0] for row in values]
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))

    @given(scores(), taus)
    @settings(deadline=None, max_examples=50)
    def test_what_is_sorted_once_makes_no_difference(self, rule, values, tau):
        one = gate(rule, tau)
        assert torch.equal(one(values, **one.order(values)), one(values))

    @given(scores(), taus)
    @settings(deadline=None, max_examples=50)
    def test_executed_experts_have_the_largest_scores(self, rule, values, tau):
        mask = gate(rule, tau)(values)
        least_run = values.masked_fill(~mask, torch.inf).amin(dim=1)
        most_left_out = values.masked_fill(mask, -torch.inf).amax(dim=1)
        assert (least_run >= most_left_out).all()


def test_dynk_max_keeps_what_reaches_the_share_of_the_largest():
    mask = gate("dynk_max", 0.4)(torch.tensor([[1.0, 0.61, 0.59, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_dynk_max_runs_an_expert_whose_score_is_nan():
    assert gate("dynk_max", 0.0)(torch.tensor([[torch.nan, 1.0]])).all()


def test_dynk_cumulative_takes_the_fewest_that_reach_the_share():
    mask = gate("dynk_cumulative", 0.7)(torch.tensor([[1.0, 5.0, 3.0, 1.0], [10.0, 0.0, 0.0, 0.0]]))
    assert mask.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_topk_runs_the_share_rounded_up():
    values = torch.rand(5, 10)
    assert gate("topk", 0.3)(values).sum(dim=1).tolist() == [3] * 5
    assert gate("topk", 0.31)(values).sum(dim=1).tolist() == [4] * 5
    assert gate("topk", 0.0)(values).sum(dim=1).tolist() == [1] * 5


@given(scores(), st.data())
@settings(deadline=None, max_examples=50)
def test_topk_runs_exactly_k(values, data):
    tokens, experts = values.shape
    k = data.draw(st.integers(1, experts))
    mask = Gate(GateConfig("topk", k=k))(values)
    assert mask.sum(dim=1).tolist() == [k] * tokens
    assert (k < experts) or mask.all()
    for row, chosen in zip(values.tolist(), mask.tolist(), strict=True):
        left_out = [score for score, run in zip(row, chosen, strict=True) if not run]
        assert min(score for score, run in zip(row, chosen, strict=True) if run) >= max(left_out, default=0.0)


def test_k_that_cannot_be():
    with pytest.raises(ConfigError, match="k=0: must be at least 1, the number of experts that each token runs"):
        GateConfig("topk", k=0)
    with pytest.raises(ConfigError, match="k=3: allowed only with rule topk, not dynk_max"):
        GateConfig(k=3)


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_tau_outside_the_unit_interval(tau):
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        GateConfig("dynk_max", tau)


def test_unknown_rule():
    with pytest.raises(ConfigError, match="rule='dynk': allowed are dynk_cumulative, dynk_max, topk"):
        GateConfig("dynk", 0.5)


@pytest.mark.parametrize(
    "half", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.array(0.5), Fraction(1, 2)]
)
def test_numbers_of_other_kinds_are_kept_as_plain_ones(half):
    config = GateConfig(tau=half)
    assert config == GateConfig(tau=0.5)
    assert type(config.tau) is float


@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2), np.uint8(2)])
def test_counts_of_other_kinds_are_kept_as_plain_ones(two):
    config = GateConfig("topk", k=two)
    assert config == GateConfig("topk", k=2)
    assert type(config.k) is int


@pytest.mark.parametrize("tau", ["0.5", None, [0.5], True, torch.tensor([0.5, 0.5]), np.array([0.1, 0.2]), 1j])
def test_what_is_no_number(tau):
    with pytest.raises(ConfigError, match=r"^tau=.*: must lie in \[0, 1\] \(1 runs every expert, the dense layer\)"):
        GateConfig(tau=tau)


def test_a_number_as_a_text_is_said_as_one():
    with pytest.raises(ConfigError, match=r"^tau='0.5': must lie in \[0, 1\]"):
        GateConfig(tau="0.5")


@pytest.mark.parametrize("k", ["2", 2.0, 2.5, True, [2], torch.tensor([2, 2]), torch.tensor(2.0), 0, -1])
def test_what_is_no_count(k):
    with pytest.raises(ConfigError, match=r"^k=.*: must be at least 1, the number of experts that each token runs$"):
        GateConfig("topk", k=k)
