"""Shares found for a budget: their sums are those of layers that run so, and do less harm than one mix for all."""

from dataclasses import astuple
from functools import partial

import pytest
import tiny
import torch

from d2dmoe_pl import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.budgets.allocation import additive_path
from d2dmoe_pl.moe.budgets.output_gradients import output_gradients
from d2dmoe_pl.moe.budgets.second_order import SecondOrder
from d2dmoe_pl.moe.conversion import add_cutoffs_, set_gate_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.cutoffs.found_shares import CutoffSearch, find_cutoff_shares
from d2dmoe_pl.moe.cutoffs.way_down import SITES, way_down
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig

TAUS = [1.0, 0.98, 0.96, 0.951, *(i / 20 for i in range(19, 0, -1))]
FULL_TAU = 0.95


def routed(kind):
    """A model, and calls of it as calibration makes them."""
    model, batch = tiny.routed(kind).eval(), tiny.batch(kind, 8)
    set_gate_(model, GateConfig("dynk_cumulative", 0.5))
    run = partial(tiny.logits, model, batch)

    def loss():
        logits = run()
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 2)

    return model, run, loss


def seen_by(model, run, loss):
    """What each layer is given, and the gradients at what it gives."""
    seen = {}
    output_gradients(model, [*moe_layers(model).values()], run, loss, lambda index, *what: seen.update({index: what}))
    return seen


@pytest.mark.parametrize(
    ("kind", "free", "least"), [("llama", SITES, 0.2), ("bert", SITES[:2], 0.25), ("timm_vit", ["hidden"], 0.4)]
)
@torch.no_grad()
def test_points_are_what_a_layer_does_that_is_set_so(kind, free, least):
    model, run, loss = routed(kind)
    layers, seen = moe_layers(model), seen_by(model, run, loss)
    for index, (name, layer) in enumerate(layers.items()):
        way = way_down(layer, CutoffConfig(1.0, 1.0, FULL_TAU), free, least, *seen[index])
        tokens = len(seen[index][0])
        assert way.dense_flops == pytest.approx(tokens * dense_ffn_flops(layer.sizes))
        assert way.points[0].flops == way.dense_flops
        assert way.points[0].divergence == pytest.approx(0, abs=1e-12)
        flops = [point.flops for point in way.points]
        assert flops == sorted(flops, reverse=True)
        assert flops[-1] <= least * way.dense_flops < flops[-2]
        assert any(point.tau < 1 for point in way.points)
        for point in way.points[1::3]:
            tau = FULL_TAU if point.tau == 1 else point.tau  # at which cutoffs count in full
            fit_cutoffs_(model, point.config, lambda _, candidate, name=name: candidate == name, run=run)
            if point.tau == 1:
                layer.choose = lambda scores, *_, **__: torch.ones_like(scores, dtype=torch.bool)
            sums = SecondOrder(model, [[1.0, tau]] * len(layers))
            sums.add(run, loss)
            vars(layer).pop("choose", None)
            add_cutoffs_(model, CutoffConfig(1.0, 1.0))
            assert float(sums.divergences[index, 1]) == pytest.approx(point.divergence, rel=1e-3)
            beside = float(sums.beside[index, 1]) if point.tau < 1 else 0.0
            assert float(sums.work[index, 1]) * pair_flops(layer.sizes) + beside == pytest.approx(point.flops, rel=1e-5)


def harm_at(model, run, loss, ffn_flops):
    """The least divergence at a budget, with cutoffs as they are and a ``tau`` for each layer."""
    layers = [*moe_layers(model).values()]
    sums = SecondOrder(model, [TAUS] * len(layers))
    sums.add(run, loss)
    tokens = sums.tokens.unsqueeze(1)
    pairs = torch.tensor([[pair_flops(layer.sizes)] for layer in layers])
    dense = float(sum(tokens[:, 0] * torch.tensor([dense_ffn_flops(layer.sizes) for layer in layers])))
    costs = ((sums.work * pairs + sums.beside) / dense).tolist()
    path = additive_path([TAUS] * len(layers), sums.divergences.tolist(), costs)
    return next(point.divergence for point in path if point.cost <= ffn_flops)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_each_layers_own_do_less_harm_than_mixes_for_all(kind):
    model, run, loss = routed(kind)
    harm = []
    for inputs, hidden, gate_proj in [
        (1.0, 1.0, 1.0),
        (0.7, 0.4, 1.0),
        (0.7, 0.4, 0.7),
        (0.5, 1.0, 1.0),
        (0.8, 0.2, 1.0),
    ]:
        fit_cutoffs_(model, CutoffConfig(inputs, hidden, FULL_TAU, gate_proj), run=run)
        harm.append(harm_at(model, run, loss, 0.4))
    found = find_cutoff_shares(model, CutoffSearch(ffn_flops=0.4), batches=[(run, loss)])
    assert len({astuple(config) for config in found.values()}) > 1
    fit_cutoffs_(model, found, run=run)
    own = harm_at(model, run, loss, 0.4)
    assert own < 0.5 * harm[0]  # experts alone
    assert own < 1.2 * min(harm)
    assert own < sum(harm[1:]) / 4


def test_what_is_given_stays():
    model, run, loss = routed("llama")
    before = {name: layer.cutoffs for name, layer in moe_layers(model).items()}
    found = find_cutoff_shares(model, CutoffSearch(0.3, inputs=1.0, gate_proj=0.6, full_tau=0.8), batches=[(run, loss)])
    for config in found.values():
        assert (config.inputs, config.gate_proj, config.full_tau) == (1.0, 0.6, 0.8)
        assert config.hidden < 1
    assert {name: layer.cutoffs for name, layer in moe_layers(model).items()} == before
    assert {layer.gate.config.tau for layer in moe_layers(model).values()} == {0.5}


def test_processes_that_see_the_same_find_the_same():
    model, run, loss = routed("llama")
    alone = find_cutoff_shares(model, CutoffSearch(), batches=[(run, loss)])
    assert find_cutoff_shares(model, CutoffSearch(), batches=[(run, loss)], reduce=lambda sums: 2 * sums) == alone


def test_a_larger_budget_leaves_out_less_and_where_there_are_no_gates_none():
    model, run, loss = routed("bert")
    small, large = (
        find_cutoff_shares(model, CutoffSearch(ffn_flops), batches=[(run, loss)]) for ffn_flops in (0.2, 0.7)
    )
    for name, config in small.items():
        assert config.gate_proj == large[name].gate_proj == 1.0
        assert config.work_share(False) < large[name].work_share(False)


@torch.no_grad()
def test_a_layer_that_no_token_comes_to_has_what_is_given():
    model, padding = tiny.routed("bert").eval(), tiny.batch("bert")
    padding["attention_mask"].zero_()
    run = partial(tiny.logits, model, padding)
    found = find_cutoff_shares(model, CutoffSearch(inputs=0.5), batches=[(run, lambda: run().sum())])
    assert set(found.values()) == {CutoffConfig(0.5, 1.0)}


def test_refused():
    with pytest.raises(ConfigError, match=r"ffn_flops=1.5: must lie in \(0, 1\), a share of the dense FFNs' FLOPs"):
        CutoffSearch(1.5)
    with pytest.raises(ConfigError, match=r"hidden=0.0: must lie in \(0, 1\]"):
        CutoffSearch(hidden=0.0)
    model = tiny.dense("bert")
    convert_to_moe_(model, ExpertsConfig(4))
    with pytest.raises(ConfigError, match="has no router or no gate yet"):
        find_cutoff_shares(model, CutoffSearch(), batches=[])
