"""Cutoffs that are told halfway too: lines from the dense layer to there, and on to where they count in full."""

import json
from functools import partial

import pytest
import tiny
import torch

from d2dmoe_pl import load_model, save_artifact, set_backend_, set_gate_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, Cutoffs
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.execution import cpu
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import Gate, GateConfig

OWN = CutoffConfig(0.5, 0.2, full_tau=0.8, gate_proj=0.4, halfway=(0.9, 0.7, 1.0))


def fitted(kind="llama", config=OWN):
    """A routed model, and a batch that its cutoffs were fitted on."""
    model, batch = tiny.routed(kind).eval(), tiny.batch(kind, 8)
    fit_cutoffs_(model, config, run=partial(tiny.logits, model, batch))
    return model, batch


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (1.0, [0.0, 0.0, 0.0]),
        (0.95, [1.0, 0.5, 2.0]),
        (0.9, [2.0, 1.0, 4.0]),
        (0.85, [2.5, 3.0, 4.0]),
        (0.8, [3.0, 5.0, 4.0]),
        (0.3, [3.0, 5.0, 4.0]),
    ],
)
def test_values_lie_on_two_lines(tau, expected):
    cutoffs = Cutoffs(OWN)
    cutoffs.values.copy_(torch.tensor([[2.0, 1.0, 4.0], [3.0, 5.0, 4.0]]))
    found = torch.stack(cutoffs(Gate(GateConfig("dynk_max", tau)), 8))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_shares_at_both_are_those_asked_for():
    model, batch = fitted()
    for layer in moe_layers(model).values():
        layer.get_gate().set_tau(1.0)
    for name, layer in moe_layers(model).items():
        seen = {}
        layer.observer = lambda tokens, hidden, layer=layer, seen=seen: seen.update(
            inputs=tokens, hidden=hidden, gate_proj=layer.experts.gates(tokens)
        )
        tiny.logits(model, batch)
        layer.observer = None
        for row, shares in zip(layer.cutoffs.values, OWN.shares, strict=True):
            for values, cutoff, share in zip(seen.values(), row, shares, strict=True):
                kept = float((values.abs() >= cutoff).float().mean())
                assert kept >= share, name
                assert kept == pytest.approx(share, abs=0.03) or float(cutoff) == 0, name


@pytest.mark.parametrize("kind", ["llama", "bert", "timm_vit"])
@pytest.mark.parametrize(
    "setting", [{"tau": tau} for tau in (1.0, 0.97, 0.9, 0.83, 0.5)] + [{"k": 3}, {"k": 8}], ids=str
)
@torch.no_grad()
def test_one_operator_gives_what_parts_give(kind, setting):
    assert cpu.compile_failure() is None
    model, batch = fitted(kind)
    set_gate_(model, GateConfig("topk" if "k" in setting else "dynk_max", **setting))
    whole = tiny.logits(model, batch)
    set_backend_(model, "reference")
    torch.testing.assert_close(whole, tiny.logits(model, batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_is_saved_and_loaded(tmp_path):
    model, batch = fitted()
    set_gate_(model, GateConfig("dynk_max", 0.85))
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))
    assert {layer.cutoffs.config for layer in moe_layers(loaded).values()} == {OWN}
    assert json.loads((tmp_path / "artifact" / "config.json").read_text())["d2dmoe"]["format"] == 8


def test_work_is_between_what_it_is_at_both():
    half = CutoffConfig(0.9, 0.7).work_share(True)
    found = [Cutoffs(OWN).work_share(tau, True) for tau in (1.0, 0.95, 0.9, 0.85, 0.8, 0.1)]
    full = OWN.work_share(True)
    assert found == pytest.approx([1.0, (1 + half) / 2, half, (half + full) / 2, full, full])


def test_where_there_are_no_gates_none_are_cut():
    model, _ = fitted("bert")
    for layer in moe_layers(model).values():
        assert layer.cutoffs.config == CutoffConfig(0.5, 0.2, 0.8, 1.0, (0.9, 0.7, 1.0))
        assert layer.cutoffs.values.shape == (2, 2)


def test_refused():
    said = r"^halfway=\(0.4, 0.7, 1.0\): must lie between \(0.5, 0.2, 0.4\), the shares in full, and 1$"
    with pytest.raises(ConfigError, match=said):
        CutoffConfig(0.5, 0.2, gate_proj=0.4, halfway=(0.4, 0.7, 1.0))
    with pytest.raises(ConfigError, match=r"^halfway=\(0.9,\): must be three shares"):
        CutoffConfig(0.5, 0.2, halfway=(0.9,))
