"""The sweep over the number of experts: each point is a plain run of that k, and says so."""

import csv

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.callbacks import TauSweep
from d2dmoe_pl.callbacks.sweep_table import as_table, draw_curve
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.phases import ExpertSelection

KS = [1, 3, 8]


@pytest.fixture(params=["mlp", "similarity", "ground_truth", "random"])
def routed(request, tmp_path):
    """The kind of a router, and the artifact of a BERT with such routers."""
    model = tiny.dense("bert")
    convert_to_moe_(model, ExpertsConfig(8))
    add_routers_(model, RouterConfig(kind=request.param))
    set_gate_(model, GateConfig("topk", k=2))
    save_artifact(model, tmp_path / "routed", [PhaseRecord("ExpertSelection")])
    return request.param, str(tmp_path / "routed")


def sweep(trainer, kind, path, **kwargs):
    callback = TauSweep(rule="topk", **kwargs)
    phase = ExpertSelection(2, kind, init_from=path)
    trainer(callbacks=[callback]).test(phase, datamodule=tiny.TextData(5), verbose=False)
    return callback.rows["test"], phase


def test_every_point_is_a_run_of_that_k(trainer, routed):
    kind, path = routed
    rows, phase = sweep(trainer, kind, path, ks=KS)
    assert [row.setting for row in rows] == KS
    layer = next(iter(moe_layers(phase.model).values()))
    for row in rows:
        plain = trainer(logger=False)
        plain.test(ExpertSelection(row.setting, kind, init_from=path), datamodule=tiny.TextData(3), verbose=False)
        assert row.score == pytest.approx(100 * float(plain.callback_metrics["test/accuracy"]))
        assert row.loss == pytest.approx(float(plain.callback_metrics["test/loss"]), rel=1e-4)
        assert set(row.layers.values()) == {100 * row.setting / 8}
        flops = row.setting * pair_flops(layer.experts)
        flops += layer.router.flops() if row.setting < 8 else 0  # all run, whatever their scores
        assert row.ffn_flops_percent == pytest.approx(100 * flops / dense_ffn_flops(layer.experts))
    shares, _ = sweep(trainer, kind, path, taus=[k / 8 for k in KS])
    for row, share in zip(rows, shares, strict=True):
        assert (row.score, row.loss, row.ffn_flops_percent) == (share.score, share.loss, share.ffn_flops_percent)


def test_the_oracle_is_charged_for_looking(trainer, tmp_path):
    model = tiny.dense("bert")
    convert_to_moe_(model, ExpertsConfig(8))
    add_routers_(model, RouterConfig(kind="ground_truth"))
    save_artifact(model, tmp_path / "routed", [PhaseRecord("ExpertSelection")])
    rows, _ = sweep(trainer, "ground_truth", str(tmp_path / "routed"), ks=[2])
    assert rows[0].ffn_flops_percent == pytest.approx(25 + 50)


def test_table_csv_curve_and_tensorboard_name_k(trainer, routed, tmp_path, capsys):
    kind, path = routed
    rows, _ = sweep(trainer, kind, path, ks=KS)
    assert f"test, rule topk, router {kind}" in capsys.readouterr().out
    with (tmp_path / "run" / "tau_sweep.csv").open() as opened:
        records = list(csv.DictReader(opened))
    assert [record["k"] for record in records] == ["1", "3", "8"]
    assert "tau" not in records[0]
    table = as_table(rows, "")
    assert (table.columns[0].header, list(table.columns[0].cells)) == ("k", ["1", "3", "8"])
    assert draw_curve(rows, {}).axes[0].get_legend().texts[0].get_text() == "test, k 1 to 8"
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    table = events.Tensors("tau_sweep/test_table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.startswith("| k |")


def test_settings_that_cannot_be(trainer, routed):
    with pytest.raises(ConfigError, match="k=1: allowed only with rule topk, not dynk_max"):
        TauSweep(ks=[1])
    with pytest.raises(ConfigError, match="k=0: must be at least 1"):
        TauSweep(rule="topk", ks=[0, 1])
    with pytest.raises(ConfigError, match=r"ks=\[\]: must hold at least one number of experts"):
        TauSweep(rule="topk", ks=[])
    assert [setting.value for setting in TauSweep(None, rule="topk", ks=[1, 2]).settings] == [1, 2]
    with pytest.raises(ConfigError, match=r"ks=\[1\]: allowed only without taus"):
        TauSweep([0.5], "topk", [1])
    with pytest.raises(ConfigError, match=r"k=9: must be at most the number of experts, 8 in bert.encoder.layer.0"):
        sweep(trainer, *routed, ks=[1, 9])
