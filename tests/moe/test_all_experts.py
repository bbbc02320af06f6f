"""Settings at which every expert runs: nothing is scored, nothing stands in, and FLOPs say so."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from d2dmoe_pl import set_tau_
from d2dmoe_pl.metrics.flops import dense_ffn_flops
from d2dmoe_pl.moe.conversion import GateConfig, add_stand_ins_, set_backend_, set_gate_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, cut
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.quantization.quantize import quantize_
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig

FULL_TAU = 0.8
ALL_EXPERTS = [GateConfig("dynk_max"), GateConfig("dynk_cumulative"), GateConfig("topk"), GateConfig("topk", k=8)]


def model_of(gate, kind="llama", cutoffs=False, parts=("router", "stand_in")):
    """A model of which some parts give NaN, so that it shows where they run."""
    model = tiny.routed(kind)
    if cutoffs:
        run = lambda: tiny.logits(model, tiny.batch(kind, size=4))  # noqa: E731
        fit_cutoffs_(model, CutoffConfig(0.7, 0.4, FULL_TAU, 0.3), run=run)
    set_gate_(model, gate)
    add_stand_ins_(model, StandInConfig(4))
    for layer in moe_layers(model).values():
        for part in parts:
            for parameter in layer.get_submodule(part).parameters():
                torch.nn.init.constant_(parameter, torch.nan)
    return model


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("backend", ["auto", "reference", "grouped", "cpu"])
@pytest.mark.parametrize("gate", ALL_EXPERTS)
@torch.no_grad()
def test_equals_the_dense_model(kind, backend, gate):
    model, inputs = model_of(gate, kind), tiny.batch(kind, size=4)
    set_backend_(model, backend)
    got = tiny.logits(model, inputs)
    set_gate_(model, None)
    torch.testing.assert_close(got, tiny.logits(model, inputs))


@pytest.mark.parametrize("gate", [GateConfig("dynk_max", 0.5), GateConfig("topk", k=7)])
@torch.no_grad()
def test_below_them_something_stands_in(gate):
    assert tiny.logits(model_of(gate, parts=["stand_in"]), tiny.batch("llama")).isnan().all()


@pytest.mark.parametrize("backend", ["auto", "reference", "grouped"])
@pytest.mark.parametrize("tau", [FULL_TAU + 0.01, 0.9, 1.0])
@pytest.mark.parametrize("rule", ["dynk_max", "dynk_cumulative", "topk"])
@torch.no_grad()
def test_above_full_tau_cutoffs_alone_count(backend, tau, rule):
    model = model_of(GateConfig(rule, tau), cutoffs=True, parts=["stand_in"])
    set_backend_(model, backend)
    for layer in moe_layers(model).values():
        x = torch.randn(7, layer.experts.d_model)
        strength = (1 - tau) / (1 - FULL_TAU)
        inputs, hidden, gates = (layer.cutoffs.values * strength).unbind()
        expected = layer.experts.combine(cut(layer.experts.hidden(cut(x, inputs), gates), hidden))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        layer.gate.set_tau(FULL_TAU)
        assert layer(x).isnan().any()  # experts are chosen


@torch.no_grad()
def test_int8_has_no_need_of_scores_either():
    model = tiny.routed("llama", tau=1.0)
    quantize_(model)
    inputs = tiny.batch("llama")
    expected = tiny.logits(model, inputs)
    for layer in moe_layers(model).values():
        for buffer in layer.router.buffers():
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    torch.testing.assert_close(tiny.logits(model, inputs), expected)


@torch.no_grad()
def test_flops_are_the_dense_layers():
    model = model_of(GateConfig("dynk_cumulative", 1.0))
    layer = next(iter(moe_layers(model).values()))
    set_backend_(model, "reference")
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, layer.experts.d_model))
    assert counter.get_total_flops() == 5 * dense_ffn_flops(layer.experts)
    assert layer.flops_beside_experts(5, 1) == 0
    set_tau_(model, 0.9)
    assert layer.flops_beside_experts(5, 1) == 5 * (layer.router.flops() + layer.stand_in.flops())


@torch.no_grad()
def test_who_watches_sees_scores_and_choices():
    model = tiny.routed("llama", tau=1.0)
    layer, masks, scores = next(iter(moe_layers(model).values())), [], []
    with_mask = layer.watch(masks.append)
    with_scores = layer.router.register_forward_hook(lambda module, args, output: scores.append(output))
    x = torch.randn(5, layer.experts.d_model)
    watched = layer(x)
    with_mask.remove()
    layer(x)
    with_scores.remove()
    torch.testing.assert_close(layer(x), watched)
    assert masks[0].all()
    assert [len(each) for each in scores] == [5, 5]


def test_routers_take_part_where_gradients_are_wanted():
    """DDP insists that every parameter that is trained has one, in every step."""
    model = tiny.routed("llama", tau=1.0)
    layer = next(iter(moe_layers(model).values()))
    layer.softness = 0.1
    layer(torch.randn(5, layer.experts.d_model)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.router.parameters())
