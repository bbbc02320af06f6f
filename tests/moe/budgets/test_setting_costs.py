"""Costs of settings before they are run, against the sums by hand."""

import pytest
import tiny
import torch

from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS
from d2dmoe_pl.moe.budgets.setting_costs import setting_costs
from d2dmoe_pl.moe.conversion import add_cutoffs_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.find_layers import moe_layers

SHARES = list(FINE_TAUS)  # as if a rule ran as many experts as tau says


def test_a_router_costs_something_but_where_every_expert_runs():
    layer = next(iter(moe_layers(tiny.routed(tau=0.3)).values()))
    dense = dense_ffn_flops(layer.sizes)
    router = layer.router.flops() / dense
    costs = setting_costs(layer, SHARES, dense)
    assert costs[-1] == 1.0
    for tau, cost in zip(FINE_TAUS[:-1], costs, strict=False):
        assert cost == pytest.approx(min(1.0, tau + router))  # more than dense is given as dense
    assert layer.gate.config.tau == 0.3
    assert dense == layer.experts.num_experts * pair_flops(layer.sizes)


def test_with_cutoffs_every_expert_runs_above_full_tau():
    model = tiny.routed("llama", tau=0.3)
    add_cutoffs_(model, CutoffConfig(0.7, 0.4, full_tau=0.8))
    layer = next(iter(moe_layers(model).values()))
    dense = dense_ffn_flops(layer.sizes)
    shares = layer.work_shares(FINE_TAUS, torch.tensor(FINE_TAUS))
    left = (2 * 0.7 + 0.4) / 3
    for tau, share in zip(FINE_TAUS, shares, strict=True):
        expected = 1 - (1 - tau) / 0.2 * (1 - left) if tau > 0.8 else tau * left
        assert share == pytest.approx(expected)
    costs = setting_costs(layer, shares, dense)
    assert costs == sorted(costs)
    assert costs[FINE_TAUS.index(0.9)] == pytest.approx(shares[FINE_TAUS.index(0.9)])  # nothing is scored there
    assert costs[FINE_TAUS.index(0.5)] == pytest.approx(0.5 * left + layer.router.flops() / dense)
