"""Cutoffs: none where every expert runs, the shares that they were fitted to elsewhere, and FLOPs counted by hand."""

import copy
import json
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe_pl import (
    ExpertsConfig,
    convert_to_moe_,
    load_model,
    merge_to_dense_,
    quantize_,
    save_artifact,
    set_backend_,
    set_gate_,
    set_tau_,
)
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import add_cutoffs_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, cut
from d2dmoe_pl.moe.cutoffs.fitting import Magnitudes, fit_cutoffs_
from d2dmoe_pl.moe.execution import BACKENDS
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig

FAMILIES = ["timm_vit", "bert", "gpt2", "llama", "gemma"]


def fitted(kind="timm_vit", batch=None, **config):
    """A routed model with cutoffs, fitted on noise."""
    model, batch = tiny.routed(kind), tiny.batch(kind, 8) if batch is None else batch
    fit_cutoffs_(model, CutoffConfig(**config), run=partial(tiny.logits, model, batch))
    return model


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_with_every_expert_on_nothing_is_left_out(kind):
    model, batch = fitted(kind), tiny.batch(kind)
    set_tau_(model, 1.0)
    with_it = tiny.logits(model, batch)
    set_tau_(model, 0.9)
    at_less = tiny.logits(model, batch)
    add_cutoffs_(model, CutoffConfig(1.0, 1.0))
    assert not torch.equal(tiny.logits(model, batch), at_less)
    set_tau_(model, 1.0)
    assert torch.equal(tiny.logits(model, batch), with_it)


@pytest.mark.parametrize(("kind", "gate_proj"), [*((kind, 1.0) for kind in FAMILIES), ("llama", 0.6)])
@torch.no_grad()
def test_is_saved_and_loaded(kind, gate_proj, tmp_path):
    model, batch = fitted(kind, inputs=0.5, gate_proj=gate_proj), tiny.batch(kind)
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))
    config = next(iter(moe_layers(loaded).values())).cutoffs.config
    assert (config.inputs, config.gate_proj) == (0.5, gate_proj)
    assert json.loads((tmp_path / "artifact" / "config.json").read_text())["d2dmoe"]["format"] == (
        6 if gate_proj == 1 else 7
    )


@given(st.lists(st.floats(-1024, 1024, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0), st.integers(1, 3))
@settings(deadline=None)
def test_magnitudes_that_a_share_of_the_values_reach(values, share, parts):
    values = torch.tensor(values)
    seen = Magnitudes(torch.device("cpu"))
    for part in values.tensor_split(parts):
        seen.add(part)
    cutoff = seen.exceeded_by(share)
    assert float((values.abs() >= cutoff).double().mean()) >= share
    above = cutoff * (1 + 2**-6) + 1e-38  # the next that the counts can tell
    assert share == 1 or float((values.abs() >= above).double().mean()) < share


@torch.no_grad()
def test_where_there_are_no_gates_none_are_cut():
    for layer in moe_layers(fitted("bert", gate_proj=0.3)).values():
        assert layer.cutoffs.config == CutoffConfig()
    model = tiny.routed("bert")
    add_cutoffs_(model, CutoffConfig(inputs=1.0, hidden=1.0, gate_proj=0.3))  # nothing is left of it
    assert all(layer.cutoffs is None for layer in moe_layers(model).values())


@torch.no_grad()
def test_the_shares_are_those_asked_for():
    batch = tiny.batch("llama", 8)
    model = fitted("llama", batch, inputs=0.6, hidden=0.3, gate_proj=0.3)  # by ReLU, half are 0
    for layer in moe_layers(model).values():
        layer.get_gate().set_tau(1.0)
    given_to = {}
    for name, layer in moe_layers(model).items():
        layer.observer = lambda tokens, hidden, name=name, experts=layer.experts: given_to.update(
            {name: (tokens, hidden, experts.gates(tokens))}
        )
    tiny.logits(model, batch)
    for name, layer in moe_layers(model).items():
        shares = [
            float((values.abs() >= cutoff).float().mean())
            for values, cutoff in zip(given_to[name], layer.cutoffs.values, strict=True)
        ]
        assert shares == pytest.approx([0.6, 0.3, 0.3], abs=0.02)


@pytest.mark.parametrize("times", [0, 1])
@torch.no_grad()
def test_a_layer_that_no_token_comes_to_leaves_nothing_out(times):
    model, padding = tiny.routed("bert"), tiny.batch("bert")
    padding["attention_mask"].zero_()
    fit_cutoffs_(model, CutoffConfig(), run=lambda: [tiny.logits(model, padding) for _ in range(times)])
    for layer in moe_layers(model).values():
        assert layer.cutoffs.values.tolist() == [0.0, 0.0]


@torch.no_grad()
def test_work_is_what_products_are_left_and_padding_is_not_counted():
    model, batch = fitted("bert"), tiny.batch("bert")
    set_tau_(model, 0.6)
    layer, done, seen, masks = next(iter(moe_layers(model).values())), [], [], []
    handles = [layer.watch_work(done.append), layer.watch(masks.append)]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole = tiny.logits(model, batch)
    for handle in handles:
        handle.remove()
    assert layer._work_observers == {}
    torch.testing.assert_close(tiny.logits(model, batch), whole, rtol=1e-5, atol=1e-5)
    tokens = seen[0][batch["attention_mask"].bool()]  # (N, d)
    inputs, hidden, gates = layer.cutoffs(layer.gate, layer.experts.num_experts)
    assert gates is None  # it has none
    activations = layer.experts.hidden(cut(tokens, inputs))  # (N, E, s)
    sizes = layer.sizes
    for token, mask, activation, work in zip(tokens, masks[0], activations, done[0], strict=True):
        products = 0
        for expert in mask.nonzero().flatten().tolist():
            products += sizes.expert_dim * int((token.abs() >= inputs).sum())
            products += sizes.d_out * int((activation[expert].abs() >= hidden).sum())
        assert float(work) == pytest.approx(products / (sizes.expert_dim * (sizes.d_model + sizes.d_out)))


@torch.no_grad()
def test_work_of_gated_experts_is_what_products_are_left():
    model, batch = fitted("llama", gate_proj=0.4), tiny.batch("llama")
    done, seen, masks = [], [], []
    set_tau_(model, 0.6)
    layer = next(iter(moe_layers(model).values()))
    layer.watch_work(done.append)
    layer.watch(masks.append)
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tiny.logits(model, batch)
    tokens, sizes = seen[0][batch["attention_mask"].bool()], layer.sizes  # (N, d)
    inputs, hidden, gates = layer.cutoffs(layer.gate, sizes.num_experts)
    passed = layer.experts.gates(cut(tokens, inputs)).abs() >= gates  # (N, E * s)
    kept = passed & (layer.experts.hidden(cut(tokens, inputs)).flatten(1).abs() >= hidden)
    assert 0.2 < passed.float().mean() < 0.5
    for token, mask, *neurons, work in zip(tokens, masks[0], passed, kept, done[0], strict=True):
        passed_here, kept_here = (int((each.view(sizes.num_experts, -1) & mask[:, None]).sum()) for each in neurons)
        products = int((token.abs() >= inputs).sum()) * (int(mask.sum()) * sizes.expert_dim + passed_here)
        products += sizes.d_out * kept_here
        assert float(work) == pytest.approx(products / (sizes.expert_dim * (2 * sizes.d_model + sizes.d_out)))


@torch.no_grad()
def test_work_without_cutoffs_is_the_pairs_that_run():
    model, done, masks = tiny.routed("llama"), [], []
    layer = next(iter(moe_layers(model).values()))
    layer.watch_work(done.append)
    layer.watch(masks.append)
    tiny.logits(model, tiny.batch("llama"))
    assert torch.equal(done[0], masks[0].sum(dim=1))


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 0.0), (0.99, 0.2), (0.975, 0.5), (0.95, 1.0), (0.0, 1.0)])
def test_they_fade_towards_the_dense_layer(tau, expected):
    model = fitted()
    set_tau_(model, tau)
    layer = next(iter(moe_layers(model).values()))
    assert float(layer.cutoffs.strength(layer.gate, 8)) == pytest.approx(expected)
    assert layer.cutoffs.work_share(tau, is_gated=False) == pytest.approx(1 - expected * 0.45)


@pytest.mark.parametrize(("k", "expected"), [(1, 1.0), (8, 0.0)])
def test_by_a_number_of_experts_they_count_in_full_but_for_all(k, expected):
    model = fitted()
    set_gate_(model, GateConfig("topk", k=k))
    layer = next(iter(moe_layers(model).values()))
    assert float(layer.cutoffs.strength(layer.gate, layer.experts.num_experts)) == expected


@pytest.mark.parametrize(("kind", "tau"), [("bert", 0.97), ("llama", 0.5), ("llama", 0.97)])
@torch.no_grad()
def test_the_operator_the_parts_and_int8_agree(kind, tau):
    model, batch = fitted(kind, gate_proj=0.3), tiny.batch(kind)
    set_tau_(model, tau)
    whole = tiny.logits(model, batch)
    for backend in ("reference", "grouped", "cpu"):
        set_backend_(model, backend)
        torch.testing.assert_close(tiny.logits(model, batch), whole, rtol=1e-5, atol=1e-5)
    set_backend_(model, "auto")
    quantize_(model)
    torch.testing.assert_close(tiny.logits(model, batch), whole, rtol=0.1, atol=0.1 * whole.abs().max().item())


@torch.no_grad()
def test_one_graph_holds_for_every_tau():
    model, batch = fitted("bert"), tiny.batch("bert")
    set_backend_(model, "grouped")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tau in (0.5, 0.98, 1.0):
            set_tau_(model, tau)
            set_tau_(compiled, tau)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_is_kept():
    model = fitted("llama")
    set_tau_(model, 0.5)
    tiny.logits(model, tiny.batch("llama")).square().mean().backward()
    weight = next(iter(moe_layers(model).values())).experts.down_weight
    assert weight.grad.abs().sum() > 0
    assert (weight.grad == 0).any()


@torch.no_grad()
def test_without_gates_every_expert_runs_and_it_is_saved_so(tmp_path):
    model, batch = fitted("bert"), tiny.batch("bert")
    set_gate_(model, None)
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))
    for each in (model, loaded):
        set_gate_(each, GateConfig(tau=0.3))
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))


@torch.no_grad()
def test_merged_to_dense_they_are_gone():
    model, batch = fitted("llama"), tiny.batch("llama")
    set_tau_(model, 1.0)
    dense = tiny.logits(model, batch)
    merge_to_dense_(model)
    torch.testing.assert_close(tiny.logits(model, batch), dense, rtol=1e-5, atol=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"inputs": 0.0}, r"^inputs=0.0: must lie in \(0, 1\], the share of values that are not left out$"),
            ({"hidden": 1.5}, r"^hidden=1.5: must lie in \(0, 1\]"),
            ({"gate_proj": 0.0}, r"^gate_proj=0.0: must lie in \(0, 1\]"),
            ({"full_tau": 1.0}, r"^full_tau=1.0: must lie in \[0, 1\); at tau=1 nothing is left out$"),
        ],
    )
    def test_shares(self, config, message):
        with pytest.raises(ConfigError, match=message):
            CutoffConfig(**config)

    def test_no_router_yet(self):
        model = tiny.dense("bert")
        with pytest.raises(ConfigError, match="no MoE layer found"):
            add_cutoffs_(model, CutoffConfig())
        convert_to_moe_(model, ExpertsConfig(4))
        with pytest.raises(ConfigError, match="has no router or no gate yet"):
            fit_cutoffs_(model, CutoffConfig(), run=lambda: None)
        assert all(layer.cutoffs is None for layer in moe_layers(model).values())

    @pytest.mark.parametrize("missing", ["cutoff", "gate_cutoff"])
    @torch.no_grad()
    def test_a_backend_of_ones_own_that_takes_none(self, missing, monkeypatch):
        def without_any(experts, tokens, mask):
            return experts.combine(experts.hidden(tokens) * mask.unsqueeze(-1))

        def of_activations(experts, tokens, mask, cutoff=None):
            return experts.combine(cut(experts.hidden(tokens), cutoff) * mask.unsqueeze(-1))

        monkeypatch.setitem(BACKENDS._registered, "own", without_any if missing == "cutoff" else of_activations)
        model, batch = fitted("llama", gate_proj=0.3), tiny.batch("llama")
        set_backend_(model, "own")
        with pytest.raises(ConfigError, match=rf"^backend='own': takes no {missing}, and the layer has one; must have"):
            tiny.logits(model, batch)
        if missing == "gate_cutoff":
            model = fitted("llama")
            expected = tiny.logits(model, batch)
            set_backend_(model, "own")
            torch.testing.assert_close(tiny.logits(model, batch), expected)
