"""A layer in one operator decides and computes what router, gate and experts do one after the other."""

import copy

import pytest
import tiny
import torch
from ffns import ACTIVATIONS, ffn_of, in_a_gap
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2dmoe_pl import set_tau_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, Cutoffs, cut
from d2dmoe_pl.moe.execution import cpu
from d2dmoe_pl.moe.execution._whole_layer import run_whole
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import Gate, GateConfig
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.routers import RouterConfig, make_router
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig, make_stand_in
from d2dmoe_pl.moe.token_context import TokenContext


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """The operators are there, as they are once a layer has asked for them."""
    assert cpu.compile_failure() is None


RULES = st.sampled_from(["dynk_max", "dynk_cumulative", "topk"])
CASES = st.fixed_dictionaries(
    {
        "positions": st.integers(0, 90),
        "num_experts": st.integers(1, 40),
        "expert_dim": st.integers(1, 20),
        "d_model": st.integers(1, 70),
        "d_out": st.none() | st.integers(1, 70),
        "width": st.integers(1, 40),
        "gated": st.booleans(),
        "bias": st.booleans(),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "rule": RULES,
        "tau": st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
        "real": st.sampled_from([None, 0.0, 0.5, 1.0]),
        "rank": st.sampled_from([0, 0, 1, 5]),
        "inputs": st.sampled_from([None, None, 0.5, 1.5]),
        "gate_proj": st.sampled_from([1.0, 0.5]),
        "seed": st.integers(0, 2**31),
    }
)


def layer_of(case, dtype=torch.float32):
    """A layer, positions for it, and which of them are no padding. Scores are exact in every type."""
    torch.manual_seed(case["seed"])
    experts = Experts(ffn_of(case), case["num_experts"])
    layer = MoELayer(experts, TokenContext(), nn.Identity()).eval()
    layer.router = make_router(experts, RouterConfig(case["width"]))
    for parameter in layer.router.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).to(parameter.dtype)
    layer.gate = Gate(GateConfig(case["rule"], case["tau"]))
    if case["rank"]:
        layer.stand_in = make_stand_in(experts, StandInConfig(case["rank"]))
        for parameter in layer.stand_in.parameters():
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    positions = torch.randint(-1, 2, (case["positions"], case["d_model"])).to(dtype)
    real = None if case["real"] is None else torch.rand(case["positions"]) < case["real"]
    layer = layer.to(dtype)
    if case.get("inputs") is not None:
        gate_proj = case.get("gate_proj", 1.0) if case["gated"] else 1.0
        layer.cutoffs = Cutoffs(CutoffConfig(full_tau=0.4, gate_proj=gate_proj)).to(dtype)
        layer.cutoffs.values[0] = case["inputs"]
        twin, strength = copy.deepcopy(layer.experts).double(), float(layer.cutoffs.strength(layer.gate, 1))
        kept = cut(positions, layer.cutoffs(layer.gate, case["num_experts"])[0]).double()
        if gate_proj < 1:
            layer.cutoffs.values[2] = in_a_gap(twin.gates(kept)) / max(0.01, strength)
        of_gates = layer.cutoffs(layer.gate, case["num_experts"])[2]
        layer.cutoffs.values[1] = in_a_gap(twin.hidden(kept, of_gates)) / max(0.01, strength)
    return layer, positions, real


def can_run(layer, positions):
    return whole(layer, positions) is not None


def whole(layer, positions, real=None):
    return run_whole(layer.experts, layer.router, layer.gate, layer.stand_in, layer.cutoffs, positions, real)


def one_after_the_other(layer, positions, real):
    """Reference experts in float64 at the positions that are real, zeros elsewhere."""
    output = torch.zeros(len(positions), layer.experts.d_out, dtype=torch.float64)
    real = torch.ones(len(positions), dtype=torch.bool) if real is None else real
    scores = layer.router(positions[real])
    mask = layer.choose(scores)
    layer.experts.double().set_backend("reference")
    if layer.cutoffs is None:
        output[real] = layer.experts(positions[real].double(), mask)
    else:
        inputs, *of_neurons = layer.cutoffs(layer.gate, layer.experts.num_experts)
        output[real] = layer.experts(cut(positions[real], inputs).double(), mask, *of_neurons)
    if layer.stand_in is not None:
        output[real] += layer.stand_in.double()(positions[real].double(), scores.double(), mask)
    return output


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@given(CASES)
@settings(deadline=None, max_examples=120)
@torch.no_grad()
def test_equals_router_gate_and_experts(dtype, tolerance, case):
    layer, positions, real = layer_of(case, dtype)
    assert can_run(layer, positions)
    got = whole(layer, positions, real)
    assert got.dtype == dtype
    expected = one_after_the_other(layer, positions, real)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)
    if real is not None:
        assert not got[~real].any()


@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_any_number_of_threads(threads):
    case = {"num_experts": 12, "expert_dim": 8, "d_model": 32, "d_out": None, "width": 16, "gated": False, "bias": True}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for positions in (1, 7, 300):
            for_all = {
                "positions": positions,
                "activation": "gelu",
                "rule": "dynk_max",
                "tau": 0.6,
                "real": 0.7,
                "rank": 4,
            }
            layer, x, real = layer_of({**case, **for_all, "seed": positions})
            got = whole(layer, x, real)
            torch.testing.assert_close(got.double(), one_after_the_other(layer, x, real), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


FEW = {"positions": 12, "num_experts": 4, "expert_dim": 3, "d_model": 6, "width": 4, "gated": True, "bias": True}


@pytest.mark.parametrize("shape", [(12, 6), (3, 4, 6), (1, 12, 6), (2, 3, 2, 6), (1, 1, 6), (6,), (0, 4, 6), (3, 0, 6)])
@pytest.mark.parametrize("is_transposed", [False, True])
@torch.no_grad()
def test_positions_of_any_shape(shape, is_transposed):
    more = {"d_out": 5, "activation": "silu", "rule": "dynk_max", "tau": 0.5, "real": None, "rank": 2, "seed": 1}
    layer, x, _ = layer_of({**FEW, **more})
    x = x[: torch.Size(shape[:-1]).numel()].view(shape)
    if is_transposed and x.dim() > 2:
        x = x.transpose(0, 1)
    got = layer(x)
    assert got.shape == (*x.shape[:-1], 5)
    expected = one_after_the_other(layer, x.reshape(-1, 6), None)
    torch.testing.assert_close(got.double().view(expected.shape), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_output_dropout_is_called_where_it_does_something():
    more = {"d_out": None, "activation": "relu", "rule": "topk", "tau": 0.0, "real": None, "rank": 0, "seed": 1}
    layer, x, _ = layer_of({**FEW, **more})
    expected, seen = layer(x), []
    layer.output_dropout = nn.Dropout(0.5).eval()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    handle = layer.output_dropout.register_forward_hook(lambda *args: seen.append(args))
    layer(x)
    assert len(seen) == 1
    handle.remove()
    layer.output_dropout.train()
    assert (layer(x) == 0).sum() > (expected == 0).sum()
    layer.output_dropout = nn.Hardtanh(-1e-3, 1e-3)  # of another kind
    assert layer(x).abs().max() <= 1e-3


@torch.no_grad()
def test_a_nan_shows_in_its_own_row_only():
    case = {"positions": 5, "num_experts": 4, "expert_dim": 3, "d_model": 6, "d_out": None, "width": 4, "gated": False}
    for rule in ("dynk_max", "dynk_cumulative", "topk"):
        layer, x, _ = layer_of(
            {**case, "bias": True, "activation": "gelu", "rule": rule, "tau": 0.5, "real": None, "rank": 3, "seed": 0}
        )
        x[2, 1] = torch.nan
        got = whole(layer, x, None)
        assert got.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_a_number_of_experts(k):
    layer = next(iter(moe_layers(tiny.routed()).values())).eval()
    layer.gate = Gate(GateConfig("topk", k=k))
    x = torch.randn(9, 16)
    expected = layer.experts(x, layer.gate(layer.router(x)))
    torch.testing.assert_close(whole(layer, x, None), expected)


class TestWhen:
    """It runs where nothing and nobody would miss it."""

    def asked(self, layer, x=None):
        return can_run(layer, torch.randn(3, 16) if x is None else x)

    def layer(self, kind="regression"):
        torch.manual_seed(0)
        layer = next(iter(moe_layers(tiny.routed()).values())).eval()
        layer.router = make_router(layer.experts, RouterConfig(4, kind))
        return layer

    @torch.no_grad()
    def test_what_it_has(self):
        assert self.asked(self.layer())
        assert not self.asked(self.layer("similarity"))
        assert not self.asked(self.layer(), torch.randn(3, 16).double())
        assert not self.asked(self.layer(), torch.randn(3, 16).bfloat16())
        other = self.layer()
        other.experts.set_backend("reference")
        assert not self.asked(other)
        with torch.autocast("cpu", torch.bfloat16):
            assert not self.asked(self.layer())

    def test_gradients(self):
        layer = self.layer()
        assert not self.asked(layer)
        layer.requires_grad_(False)
        assert self.asked(layer)
        assert not self.asked(layer, torch.randn(3, 16, requires_grad=True))

    @pytest.mark.parametrize("part", ["gate", "router", "experts"])
    @torch.no_grad()
    def test_whoever_watches_sees_everything(self, part):
        layer, seen = self.layer(), []
        handle = getattr(layer, part).register_forward_hook(lambda module, args, output: seen.append(output))
        x = torch.randn(2, 3, 16)
        watched = layer(x)
        handle.remove()
        assert len(seen) == 1
        assert self.asked(layer)
        torch.testing.assert_close(layer(x), watched)


@torch.no_grad()
def test_tau_is_read_at_each_call():
    model = tiny.routed("bert").eval()
    inputs = tiny.batch("bert")
    for parameter in model.parameters():
        parameter.mul_(8)  # the logits then differ visibly
    results = []
    for tau in (0.0, 0.5, 1.0):
        set_tau_(model, tau)
        results.append(tiny.logits(model, inputs))
        layers = moe_layers(model).values()
        handles = [layer.watch(lambda mask: None) for layer in layers]  # one after the other
        torch.testing.assert_close(tiny.logits(model, inputs), results[-1], rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


class Adapted(nn.Linear):
    """As adapters do: more than its weights."""

    def forward(self, x):
        return super().forward(x) + 1


@torch.no_grad()
def test_layers_that_are_more_than_their_weights_are_run_as_they_are():
    layer, x = next(iter(moe_layers(tiny.routed()).values())).eval(), torch.randn(5, 16)
    assert can_run(layer, x)
    layer.router.up = Adapted(16, layer.router.up.out_features)
    assert not can_run(layer, x)
    expected = layer.experts(x, layer.gate(layer.router(x)))
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_parametrised_experts():
    layer, x = next(iter(moe_layers(tiny.routed()).values())).eval(), torch.randn(5, 16)

    class Shifted(nn.Module):
        def forward(self, bias):
            return bias + 1

    torch.nn.utils.parametrize.register_parametrization(layer.experts, "up_bias", Shifted())
    expected = layer.experts.combine(layer.experts.hidden(x) * layer.gate(layer.router(x)).unsqueeze(-1))
    torch.testing.assert_close(layer(x), expected)
