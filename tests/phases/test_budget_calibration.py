"""The phase that finds budgets: what is promised is what is measured, and the way there is the same every time."""

import pytest
import tiny
import torch
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl import load_model, set_budget_
from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import Digits
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.budgets.budget_path import budget_path
from d2dmoe_pl.moe.conversion import set_gate_, set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.phases import BudgetCalibration, RecoveryTuning, StandInFitting, budget_calibration
from d2dmoe_pl.phases._beside_dense import BesideDense
from d2dmoe_pl.phases._held_out import held_out

BUDGETS = [0.6, 0.4, 0.3]
FEW = {"num_samples": 30, "num_scored_points": 5}  # where it is not the way down that matters


@pytest.fixture
def routed(tmp_path):
    model = tiny.route_(digits_source().build(DIGIT_LABELS))
    save_artifact(model, tmp_path / "routed", [PhaseRecord("RouterRegression")])
    return str(tmp_path / "routed")


def calibrated(trainer, routed, batch_size=16, callbacks=(), **kwargs):
    phase = BudgetCalibration(**{"num_samples": 100, "num_scored_points": 60, "init_from": routed, **kwargs})
    run = trainer(callbacks=[SaveArtifact(), *callbacks], limit_val_batches=1.0)
    run.fit(phase, datamodule=Digits(batch_size))
    return phase, f"{run.log_dir}/artifact"


def test_costs_and_scores_are_those_of_a_sweep(trainer, routed):
    sweep = TauSweep(budgets=BUDGETS)
    _, path = calibrated(trainer, routed, callbacks=[sweep])
    model = load_model(path)
    for budget, row in zip(BUDGETS, sweep.rows["validation"], strict=True):
        promised = set_budget_(model, ffn_flops=budget)
        assert (row.swept, row.setting) == ("budget", budget)
        assert row.ffn_flops_percent == pytest.approx(100 * budget, rel=0.03)
        assert row.model_flops_percent == pytest.approx(100 * promised.flops, rel=0.03)
    points = budget_path(model).points
    assert points[0].taus == (1.0,) * len(moe_layers(model))
    assert points[0].divergence == pytest.approx(0, abs=1e-6)
    assert points[-1].divergence > points[len(points) // 2].divergence > 0
    assert read_artifact(path).budgets == budget_path(model)


def test_padding_that_a_gate_is_given_counts_for_nothing(trainer, tmp_path, monkeypatch):
    """Off the CPU a layer's parts are given all positions."""
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    seen, shares = [], budget_calibration.work_shares

    def kept(phase, batches, rule):
        lengths = []
        counted = (
            layer.get_gate().register_forward_hook(lambda gate, args, mask: lengths.append(len(mask)))
            for layer in moe_layers(phase.model).values()
        )
        with hooked(counted):
            seen.append(shares(phase, batches, rule))
        seen.append(sum(lengths))
        return seen[-2]

    def all_positions(layer, positions, real):
        output = layer._run_tokens(positions, real)
        return output if real is None else torch.where(real.unsqueeze(1), output, 0)

    monkeypatch.setattr(budget_calibration, "work_shares", kept)
    for parts in (MoELayer._run_parts, all_positions):
        monkeypatch.setattr(MoELayer, "_run_parts", parts)
        phase = BudgetCalibration(num_samples=30, num_scored_points=5, init_from=str(tmp_path / "routed"))
        trainer(limit_val_batches=1.0).fit(phase, datamodule=tiny.TextData(8))
    of_tokens, tokens, of_positions, positions = seen
    assert tokens < positions
    assert torch.tensor(of_positions).allclose(torch.tensor(of_tokens))


@torch.no_grad()
def naively(phase, taus):
    """Divergence, FFN FLOPs and score of a setting, from whole runs of the model alone."""
    layers, task, model = moe_layers(phase.model), phase.task, phase.model
    batches, metrics = held_out(phase, 2000), phase.task.metrics()
    divergence = ran = every = weight = 0.0
    for batch in batches:
        set_tau_(model, 1.0)
        dense = tiny.logits(model, batch)
        works = []
        with hooked(layer.watch_work(works.append) for layer in layers.values()):
            for layer, tau in zip(layers.values(), taus, strict=True):
                layer.gate.set_tau(tau)
            logits = tiny.logits(model, batch)
        for layer, work in zip(layers.values(), works, strict=True):
            ran += float(work.sum()) * pair_flops(layer.sizes) + layer.flops_beside_experts(len(work), 1)
            every += len(work) * dense_ffn_flops(layer.sizes)
        divergence += task.weight(batch) * float(task.prediction_loss(logits, dense, batch))
        weight += task.weight(batch)
        metrics.update(logits, batch)
    score = float(metrics.compute()[task.main_metric])
    return divergence / weight, ran / every, 100 * score if task.in_percent else score


@pytest.mark.thorough
@pytest.mark.parametrize("estimate", ["measured", "gradients"])
def test_points_are_what_whole_runs_give(trainer, routed, estimate):
    phase, _ = calibrated(trainer, routed, num_scored_points=1000, estimate=estimate)
    points = budget_path(phase.model).points
    for point in (points[0], points[len(points) // 2], points[-1]):
        divergence, ffn_flops, score = naively(phase, point.taus)
        assert point.divergence == pytest.approx(divergence, rel=1e-5, abs=1e-7)
        assert point.ffn_flops == pytest.approx(ffn_flops, rel=1e-6)
        assert point.score == pytest.approx(score, rel=1e-6)


def test_is_at_least_as_near_to_dense_as_one_tau_for_all(trainer, routed):
    phase, _ = calibrated(trainer, routed, num_samples=400)
    path = budget_path(phase.model)
    samples = BesideDense(phase, held_out(phase, 400), keeps_vocabulary=False)
    worse = 0
    with torch.no_grad():
        for tau in (0.7, 0.8, 0.9):
            uniform = phase._measure(samples, [tau] * len(path.layers))
            worse += path.at_cost("ffn_flops", uniform.cost).divergence > uniform.divergence
    assert worse <= 1


def test_gradients_tell_about_what_measuring_does(trainer, routed):
    """Beside the measured way, and beside one tau for all."""
    measured, estimated = (
        budget_path(calibrated(trainer, routed, num_samples=400, estimate=how)[0].model)
        for how in ("measured", "gradients")
    )
    for share in (0.5, 0.7):
        ways = [path.at_cost("ffn_flops", share).divergence for path in (measured, estimated)]
        assert ways[1] < 1.5 * ways[0]
    assert estimated.dense == measured.dense


@pytest.mark.thorough
def test_depends_on_neither_the_batch_size_nor_the_run(trainer, routed):
    paths = [budget_path(calibrated(trainer, routed, size)[0].model) for size in (16, 16, 50)]
    assert paths[0] == paths[1]
    assert [point.taus for point in paths[0].points[:10]] == [point.taus for point in paths[2].points[:10]]
    for one, other in zip(paths[0].points[::8], paths[2].points[::8], strict=False):
        assert one.ffn_flops == pytest.approx(other.ffn_flops, rel=1e-2)


def test_padded_texts_and_stand_ins(trainer, tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    run = trainer(callbacks=[SaveArtifact()])
    run.fit(StandInFitting(rank=4, init_from=str(tmp_path / "routed")), datamodule=tiny.TextData(8))
    phase = BudgetCalibration(num_samples=8, init_from=str(tmp_path / "run" / "artifact"))
    sweep = TauSweep(budgets=[0.9, 0.01])
    trainer(callbacks=[sweep], limit_val_batches=1.0).fit(phase, datamodule=tiny.TextData(8))
    (row,) = sweep.rows["validation"]  # the other is out of reach, which is said
    assert row.ffn_flops_percent == pytest.approx(90, rel=0.05)


def test_the_budget_that_is_saved(trainer, routed):
    phase, path = calibrated(trainer, routed, ffn_flops=0.4, **FEW)
    saved = [layer.gate.config.tau for layer in moe_layers(load_model(path)).values()]
    assert saved == pytest.approx(list(budget_path(phase.model).at_cost("ffn_flops", 0.4).taus))
    phase, _ = calibrated(trainer, routed, ffn_flops=0.001, **FEW)  # the least there is
    assert [layer.gate.config.tau for layer in moe_layers(phase.model).values()] == [0.0, 0.0]


def test_a_model_that_is_trained_on_forgets_its_budgets(trainer, routed):
    _, path = calibrated(trainer, routed, **FEW)
    phase = RecoveryTuning(init_from=path)
    trainer().fit(phase, datamodule=Digits(16))
    assert budget_path(phase.model) is None


def test_a_run_that_is_evaluated_keeps_them(trainer, routed):
    _, path = calibrated(trainer, routed)
    sweep = TauSweep(budgets=[0.5])
    run = trainer(callbacks=[sweep], limit_val_batches=1.0)
    run.validate(BudgetCalibration(init_from=path), datamodule=Digits(16), verbose=False)
    assert sweep.rows["validation"][0].ffn_flops_percent == pytest.approx(50, rel=0.03)


@pytest.mark.thorough
@pytest.mark.parametrize("asked", [0.4, 0.001, None])
def test_an_evaluation_goes_to_the_budget_that_is_asked_for(trainer, routed, asked, caplog):
    fitted, path = calibrated(trainer, routed, ffn_flops=0.6)
    caplog.set_level("INFO")
    for budget, said in ((0.6, 0), (asked, 0 if asked is None else 1)):
        phase = BudgetCalibration(ffn_flops=budget, init_from=path)
        trainer().test(phase, datamodule=Digits(16), verbose=False)
        assert sum("which is asked for, in the place" in message for message in caplog.messages) == said
    least = budget_path(fitted.model).points[-1].ffn_flops
    wanted = load_model(path)
    set_budget_(wanted, ffn_flops=max(least, asked or 0.6))
    taus = [[layer.gate.config.tau for layer in moe_layers(model).values()] for model in (wanted, phase.model)]
    assert taus[0] == taus[1]
    with pytest.raises(ConfigError, match="ffn_flops=None: is for evaluations"):
        calibrated(trainer, routed, ffn_flops=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: BudgetCalibration(ffn_flops=0.0), r"ffn_flops=0.0: must lie in \(0, 1\]"),
        (
            lambda path: BudgetCalibration(ffn_flops=25),
            r"ffn_flops=25: must lie in \(0, 1\], a share of the dense FFNs' FLOPs",
        ),
        (lambda path: BudgetCalibration(keep=1.0), r"keep=1.0: must lie in \(0, 1\)"),
        (lambda path: BudgetCalibration(num_samples=0), "num_samples=0: must be positive"),
        (lambda path: BudgetCalibration(num_scored_points=1), "num_scored_points=1: must be more than 1"),
        (lambda path: TauSweep(budgets=[]), "budgets=.*: must hold at least one share"),
        (lambda path: TauSweep(budgets=[0.0]), r"budgets=0.0: must lie in \(0, 1\]"),
        (lambda path: TauSweep(budgets=[0.1, 50]), r"budgets=50: must lie in \(0, 1\]"),
        (lambda path: TauSweep([0.5], budgets=[0.5]), "allowed only without taus and ks"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make(None)


def test_too_few_samples(trainer, routed):
    with pytest.raises(ConfigError) as error:
        calibrated(trainer, routed, num_samples=5)
    expected = "num_samples=5: 5 validation samples are too few; 2 layers need at least 8"
    assert str(error.value) == expected


def test_budgets_of_a_model_that_knows_none(trainer, tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    phase = StandInFitting(init_from=str(tmp_path / "routed"), rank=2)
    with pytest.raises(ConfigError, match="budgets: the model knows none; the sweep must be of BudgetCalibration"):
        trainer(callbacks=[TauSweep(budgets=[0.5])], num_sanity_val_steps=0).fit(phase, datamodule=tiny.TextData(8))


def test_layers_of_two_rules_are_refused(trainer, routed, tmp_path):
    model = load_model(routed)
    set_gate_(model, GateConfig("topk", tau=0.5), lambda layer, name: "0" in name)
    save_artifact(model, tmp_path / "two", [PhaseRecord("RouterRegression")])
    with pytest.raises(ConfigError, match="gates: have the rules dynk_max, topk; must be one for all layers"):
        calibrated(trainer, str(tmp_path / "two"))
