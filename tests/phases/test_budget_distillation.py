"""Routers and stand-ins learn from predictions; nothing else moves."""

import shutil
from types import MappingProxyType

import pytest
import tiny
import torch
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl import load_model
from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import Digits
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import budget_path, set_taus_
from d2dmoe_pl.moe.budgets.held_work import HeldWork
from d2dmoe_pl.moe.budgets.kept_way import TRAINED, way_from_tensors, way_tensors
from d2dmoe_pl.moe.conversion import add_stand_ins_, set_gate_, temporary_gate
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig
from d2dmoe_pl.phases import BudgetCalibration, BudgetDistillation, _teacher
from d2dmoe_pl.phases._hidden_states import hidden_state_error, logits_and_weighed_states


@pytest.fixture
def calibrated(trainer, tmp_path):
    """An untrained ViT of routers that know nothing, with budgets."""
    model = tiny.route_(digits_source().build(DIGIT_LABELS))
    add_stand_ins_(model, StandInConfig(rank=4))
    save_artifact(model, tmp_path / "routed", [PhaseRecord("RouterRegression")])
    phase = BudgetCalibration(
        num_samples=100, num_scored_points=5, estimate="gradients", init_from=str(tmp_path / "routed")
    )
    run = trainer(callbacks=[SaveArtifact()], limit_val_batches=1.0)
    run.fit(phase, datamodule=Digits(50))
    return f"{run.log_dir}/artifact"


def distilled(trainer, calibrated, settings=MappingProxyType({}), lr=3e-3, **kwargs):
    optimizer = lambda parameters: torch.optim.Adam(parameters, lr=lr)  # noqa: E731
    budgets = {"ffn_flops_min": 0.4, "ffn_flops_max": 0.8}
    phase = BudgetDistillation(init_from=calibrated, optimizer=optimizer, **{**budgets, **settings})
    run = trainer(limit_train_batches=1.0, callbacks=[SaveArtifact()], **kwargs)
    run.fit(phase, datamodule=Digits(50))
    return phase, f"{run.log_dir}/artifact"


def divergence(model, path, phase, dense):
    """From the model ``dense`` with every expert on, sum over some budgets."""
    model.eval()
    batch = next(iter(phase.data.val_dataloader()))
    total = 0.0
    with torch.no_grad():
        with temporary_gate(dense, None):
            wanted = tiny.logits(dense, batch)
        for share in (0.5, 0.7):
            set_taus_(model, path, path.at_cost("ffn_flops", share).taus)
            total += phase.task.prediction_loss(tiny.logits(model, batch), wanted, batch).item()
    return total


def test_predictions_come_nearer_and_the_model_stays_the_same_to_the_bit(trainer, calibrated):
    before = load_model(calibrated)
    path = budget_path(before)
    phase, folder = distilled(trainer, calibrated, max_epochs=3)
    after = load_model(folder)
    assert budget_path(after) is None  # shares have moved
    states = before.state_dict(), after.state_dict()
    moved = {name for name, value in states[0].items() if not value.equal(states[1][name])}
    assert moved
    assert all(".router." in name or ".stand_in." in name for name in moved)
    assert divergence(after, path, phase, before) < 0.8 * divergence(before, path, phase, before)


@pytest.mark.parametrize("trains", ["routers", "model"])
def test_a_calibration_behind_it_keeps_the_settings_and_measures_them_anew(trainer, calibrated, tmp_path, trains):
    calibrated = str(shutil.copytree(calibrated, tmp_path / "calibrated"))  # the run's folder is used again
    before = budget_path(load_model(calibrated))
    _, folder = distilled(trainer, calibrated, {"trains": trains}, max_epochs=3)
    folder = str(shutil.copytree(folder, tmp_path / "distilled"))
    phase = BudgetCalibration(num_scored_points=100, init_from=folder)
    sweep = TauSweep(budgets=[0.7, 0.5])
    trainer(limit_val_batches=1.0, callbacks=[sweep]).fit(phase, datamodule=Digits(50))
    after = budget_path(phase.model)
    assert len(after.points) > 0.9 * len(before.points)  # but for those that are no cheaper than the one before
    costs = [row.ffn_flops_percent for row in sweep.rows["validation"]]
    assert costs == pytest.approx([70, 50], rel=0.03)
    kept = read_artifact(folder).read_tensors(TRAINED)["taus"]
    assert {point.taus for point in after.points} <= {tuple(taus) for taus in kept.tolist()}
    other = BudgetCalibration(num_samples=100, num_scored_points=5, estimate="gradients", init_from=folder)
    trainer(limit_val_batches=1.0).fit(other, datamodule=Digits(50))
    assert not {point.taus for point in budget_path(other.model).points} <= {point.taus for point in after.points}


@pytest.mark.parametrize("is_held", [True, False])
def test_layers_do_the_work_that_they_did_at_first(trainer, calibrated, monkeypatch, is_held):
    """Scores change as they learn: settings that stayed would have more experts run."""
    if not is_held:
        monkeypatch.setattr(HeldWork, "taus", lambda held, taus: tuple(taus))
    before = way_tensors(budget_path(load_model(calibrated)))
    _, folder = distilled(trainer, calibrated, {"trains": "model"}, lr=0.01, max_epochs=6)
    way = way_from_tensors(read_artifact(folder).read_tensors(TRAINED))
    phase = BudgetCalibration(num_scored_points=100, init_from=folder)
    trainer(limit_val_batches=1.0).fit(phase, datamodule=Digits(50))
    costs = {point.taus: point.ffn_flops for point in budget_path(phase.model).points}
    moved = [
        abs(costs[point.taus] / cost - 1)
        for point, cost in zip(way, before["ffn_flops"].tolist(), strict=True)
        if 0.4 < cost < 0.8 and point.taus in costs
    ]
    assert len(moved) > 5
    assert (max(moved) < 0.1) == is_held


def test_settings_that_nothing_was_trained_at_cannot_be_kept(trainer, calibrated):
    message = "^estimate='kept': init_from='.*' is the work of BudgetCalibration, and keeps no budgets; must be that of"
    with pytest.raises(ConfigError, match=message):
        trainer().fit(BudgetCalibration(estimate="kept", init_from=calibrated), datamodule=Digits(50))


def test_budgets_that_the_model_cannot_reach_are_its_least(trainer, calibrated):
    least = budget_path(load_model(calibrated)).points[-1].taus
    _, folder = distilled(trainer, calibrated, {"ffn_flops_min": 0.01, "ffn_flops_max": 0.02}, max_epochs=1)
    assert tuple(layer.gate.config.tau for layer in moe_layers(load_model(folder)).values()) == least


@pytest.mark.parametrize(("trains", "models"), [("routers", 0), ("model", 1)])
def test_a_second_model_is_read_only_to_train_the_whole(trainer, calibrated, monkeypatch, trains, models):
    read = []
    monkeypatch.setattr(_teacher, "load_model", lambda path, mapped: read.append(path) or load_model(path))
    distilled(trainer, calibrated, {"trains": trains}, max_epochs=1)
    assert read == [calibrated] * models


def test_the_whole_model_learns_from_what_it_was(trainer, calibrated):
    before = load_model(calibrated)
    path = budget_path(before)
    phase, folder = distilled(trainer, calibrated, {"trains": "model"}, max_epochs=3)
    after = load_model(folder)
    experts = {name: value for name, value in before.state_dict().items() if ".experts." in name}
    assert all(not value.equal(after.state_dict()[name]) for name, value in experts.items())
    for name, value in phase._teacher.model.state_dict().items():
        assert value.equal(before.state_dict()[name])
    assert divergence(after, path, phase, before) < 0.8 * divergence(before, path, phase, before)


@pytest.mark.parametrize("trains", ["routers", "model"])
def test_another_model_may_be_learnt_from(trainer, calibrated, tmp_path, trains):
    before = load_model(calibrated)
    path = budget_path(before)
    torch.manual_seed(1)
    other = digits_source().build(DIGIT_LABELS).eval()
    save_artifact(other, tmp_path / "other", [PhaseRecord("FineTuning")])
    settings = {"trains": trains, "teacher": str(tmp_path / "other")}
    phase, folder = distilled(trainer, calibrated, settings, max_epochs=3)
    batch = next(iter(phase.data.val_dataloader()))
    with torch.no_grad():
        wanted = tiny.logits(other, batch)
        errors = []
        for model in (before, load_model(folder)):
            set_taus_(model, path, path.at_cost("ffn_flops", 0.6).taus)
            errors.append(phase.task.prediction_loss(tiny.logits(model.eval(), batch), wanted, batch))
    assert errors[1] < (0.5 if trains == "model" else 0.95) * errors[0]


def test_routers_learn_at_a_rate_of_their_own(trainer, calibrated):
    before = load_model(calibrated).state_dict()
    _, folder = distilled(trainer, calibrated, {"trains": "model", "router_lr": 3e-3}, lr=0.0, max_epochs=1)
    after = load_model(folder).state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if ".router." in name}


@pytest.mark.thorough
@pytest.mark.parametrize("trains", ["routers", "model"])
def test_hidden_states_come_nearer_where_they_count(trainer, calibrated, trains, tmp_path):
    calibrated = str(shutil.copytree(calibrated, tmp_path / "calibrated"))  # the run's folder is used again
    dense = load_model(calibrated)
    path = budget_path(dense)
    set_gate_(dense, None)
    errors = []
    for weight in (0.0, 20.0):
        phase, folder = distilled(trainer, calibrated, {"trains": trains, "hidden_weight": weight}, max_epochs=3)
        assert ("train/hidden_state_loss" in phase.trainer.callback_metrics) == (weight > 0)
        model = load_model(folder)
        set_taus_(model, path, path.at_cost("ffn_flops", 0.6).taus)
        batch = next(iter(phase.data.val_dataloader()))
        with torch.no_grad():
            states, wanted = (logits_and_weighed_states(each.eval(), batch, 1.0)[1] for each in (model, dense))
        errors.append(hidden_state_error(states, wanted, batch).item())
    assert errors[1] < 0.95 * errors[0]


def test_a_model_without_budgets_is_refused(trainer, tmp_path):
    model = tiny.route_(digits_source().build(DIGIT_LABELS))
    save_artifact(model, tmp_path / "routed", [PhaseRecord("RouterRegression")])
    with pytest.raises(
        ConfigError,
        match=r"init_from='.*routed': is the work of RouterRegression; BudgetDistillation draws budgets, and needs "
        r"BudgetCalibration before it",
    ):
        distilled(trainer, str(tmp_path / "routed"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ffn_flops_min": 0.9, "ffn_flops_max": 0.5}, "ffn_flops_min=0.9: must be positive and at most"),
        ({"softness": 0.0}, "softness=0.0: must be positive"),
        ({"router_lr": 0.0}, "router_lr=0.0: must be positive"),
        ({"task_weight": -1.0}, "task_weight=-1.0: must not be negative"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0: must not be negative"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ConfigError, match=message):
        BudgetDistillation(**settings)
