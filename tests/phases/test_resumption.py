"""Resumed from any checkpoint, in the middle of an epoch too, a phase leaves the same bits as one that was not."""

import lightning as L
import pytest
import torch
from digits_models import digits_source
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file

from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.data import Digits
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    BudgetDistillation,
    CutoffFitting,
    ExpertClustering,
    FineTuning,
    ImportanceScoring,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
    StandInFitting,
    budget_distillation,
)

BATCHES = 4
PHASES = {
    "fine-tuning": ("dense", lambda start: FineTuning(source=digits_source(), activation="relu")),
    "hidden-states": ("dense", lambda start: FineTuning(hidden_weight=5.0, init_from=start)),
    "hidden-states-and-penalty": ("dense", lambda start: SparsityEnforcement(hidden_weight=5.0, init_from=start)),
    "projections": ("dense", lambda start: AttentionDistillation(["output"], init_from=start)),
    "sparsity": ("dense", lambda start: SparsityEnforcement(init_from=start)),
    "importance": ("dense", lambda start: ImportanceScoring(init_from=start)),
    "clustering": ("dense", lambda start: ExpertClustering(8, init_from=start)),
    "routers": ("experts", lambda start: RouterRegression(8, init_from=start)),
    "recovery": ("routed", lambda start: RecoveryTuning(init_from=start)),
    "cutoffs": ("routed", lambda start: CutoffFitting(num_tokens=500, init_from=start)),
    "stand-ins": ("routed", lambda start: StandInFitting(rank=4, num_tokens=500, init_from=start)),
    "budgets": ("routed", lambda start: BudgetCalibration(num_samples=40, num_scored_points=3, init_from=start)),
    "predictions": ("calibrated", lambda start: BudgetDistillation("model", init_from=start)),
}


@pytest.fixture(autouse=True)
def looked_at_often(monkeypatch):
    monkeypatch.setattr(budget_distillation, "LOOKED_AT_EVERY", 3)


class SaveAll(L.Callback):
    """Save after every step, but for the last of an epoch, and after every epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, phase, outputs, batch, batch_idx):
        if batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    def on_train_epoch_end(self, trainer, phase):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-end.ckpt")


@pytest.fixture
def fit(trainer, tmp_path):
    def run(phase, folder, ckpt_path=None, workers=0, callbacks=(), **changes):
        L.seed_everything(3, verbose=False)
        if ckpt_path is not None:
            torch.rand(7)  # what was drawn before is of no consequence
        settings = {
            "max_epochs": 2,
            "limit_train_batches": BATCHES,
            "default_root_dir": folder,
            "logger": False,
        } | changes
        own = trainer(callbacks=[SaveArtifact(), *callbacks], **settings)
        own.fit(phase, datamodule=Digits(64, workers), ckpt_path=ckpt_path, weights_only=ckpt_path and True)
        files = sorted((folder / "artifact").glob("*.safetensors"))
        return [load_file(file) for file in files], (folder / "artifact" / "config.json").read_text()

    return run


@pytest.mark.thorough
@pytest.mark.parametrize(
    "ending",
    [
        {"max_steps": 7},
        {"max_steps": 7, "max_epochs": -1},
        {"max_steps": 20, "max_epochs": 3},
        {"max_steps": 7, "check_val_every_n_epoch": 2},
        {"max_steps": 7, "val_check_interval": 0.5},
    ],
    ids=str,
)
def test_a_training_that_steps_end(fit, tmp_path, ending):
    def phase():
        return FineTuning(source=digits_source(), activation="relu", decay="linear")

    saved = tmp_path / "saved"
    (tensors, *_), _ = fit(phase(), tmp_path / "whole", callbacks=[SaveAll(saved)], **ending)
    checkpoints = sorted(saved.glob("*.ckpt"))
    assert len(checkpoints) >= 7
    for checkpoint in checkpoints:
        (found, *_), _ = fit(phase(), tmp_path / f"from-{checkpoint.stem}", str(checkpoint), **ending)
        assert all(torch.equal(found[name], value) for name, value in tensors.items()), checkpoint.name


@pytest.mark.thorough
@pytest.mark.parametrize("kind", list(PHASES))
def test_from_every_checkpoint(fit, artifact, tmp_path, kind):
    stage, make = PHASES[kind]
    start = artifact(stage)
    saved = tmp_path / "saved"
    tensors, config = fit(make(start), tmp_path / "whole", callbacks=[SaveAll(saved)])
    checkpoints = sorted(saved.glob("*.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        found, found_config = fit(make(start), tmp_path / f"from-{checkpoint.stem}", str(checkpoint))
        assert found_config == config
        for one, other in zip(found, tensors, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], value) for name, value in other.items()), checkpoint.name


def test_loader_processes_change_nothing(fit, artifact, tmp_path):
    make = PHASES["sparsity"][1]
    start = artifact("dense")
    alone, _ = fit(make(start), tmp_path / "alone")
    saved = tmp_path / "saved"
    helped, _ = fit(make(start), tmp_path / "helped", workers=2, callbacks=[SaveAll(saved)])
    resumed, _ = fit(make(start), tmp_path / "resumed", str(saved / "1-1.ckpt"), workers=2)
    for one, other, third in zip(alone, helped, resumed, strict=True):
        assert all(torch.equal(one[name], value) and torch.equal(third[name], value) for name, value in other.items())


def test_a_pass_in_order_goes_on_with_as_many_processes_only(fit, artifact, tmp_path):
    start, saved = artifact("dense"), tmp_path / "saved"
    fit(ImportanceScoring(init_from=start), tmp_path / "whole", callbacks=[SaveAll(saved)])
    checkpoint = torch.load(saved / "0-1.ckpt", weights_only=True)
    checkpoint["ordered_pass"]["world_size"] = 2
    torch.save(checkpoint, saved / "other.ckpt")
    with pytest.raises(ConfigError, match=r"^devices=1: a pass in order goes on from its middle only as it was begun"):
        fit(ImportanceScoring(init_from=start), tmp_path / "other", str(saved / "other.ckpt"))


def test_a_pass_that_fails_leaves_the_data_as_it_was(trainer, artifact):
    class Broken(ImportanceScoring):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    data = Digits(16)
    phase = Broken(init_from=artifact("dense"))
    with pytest.raises(RuntimeError, match="broken"):
        trainer().fit(phase, datamodule=data)
    trainer(limit_train_batches=1).fit(FineTuning(source=digits_source()), datamodule=data)
    assert not data.is_ordered
    first = next(iter(data.training_loader()))["pixel_values"]
    with data.in_order():
        assert not torch.equal(next(iter(data.training_loader()))["pixel_values"], first)


def test_a_training_that_has_ended_early_stays_ended(fit, tmp_path):
    """Killed behind its end, and gone on with; unless who stopped it is gone, or nothing but the time was over."""
    stop = {"monitor": "validation/loss", "patience": 1, "min_delta": 100.0}
    keep = {"max_epochs": 6, "enable_checkpointing": True}

    def run(folder, ckpt_path=None, *more, **changes):
        phase = FineTuning(source=digits_source(), activation="relu")
        last = ModelCheckpoint(tmp_path / "last", filename="last", enable_version_counter=False)
        return fit(phase, tmp_path / folder, ckpt_path, callbacks=[last, *more], **keep | changes), phase

    (weights, config), phase = run("whole", None, EarlyStopping(**stop))
    assert phase.trainer.current_epoch == 2
    (again, config_again), phase = run("again", tmp_path / "last" / "last.ckpt", EarlyStopping(**stop))
    assert phase.trainer.global_step == 2 * BATCHES
    assert config_again == config
    assert all(torch.equal(value, again[0][name]) for name, value in weights[0].items())
    _, phase = run("on", tmp_path / "last" / "last.ckpt")
    assert phase.trainer.current_epoch == 6


def test_what_is_monitored_between_two_validations(fit, tmp_path):
    """Checkpoints within an epoch go by the validation before; also of the epoch that a training is resumed in."""

    def run(folder, ckpt_path=None):
        save = SaveAll(tmp_path)
        best = ModelCheckpoint(
            tmp_path / folder, "{epoch}-{step}", "validation/loss", every_n_train_steps=3, save_top_k=-1
        )
        phase = FineTuning(source=digits_source(), activation="relu")
        changes = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [save, best]}
        fit(phase, tmp_path / folder, ckpt_path, **changes)
        files = (tmp_path / folder).glob("*.ckpt")
        return sorted((file.name for file in files), key=lambda name: int(name.split("=")[-1][:-5])), phase.best

    names, best = run("whole")
    assert "epoch=1-step=6.ckpt" in names
    for place, first in (("1-0", "epoch=1-step=6.ckpt"), ("1-2", "epoch=2-step=9.ckpt")):
        resumed, best_again = run(place, tmp_path / f"{place}.ckpt")
        assert resumed == names[names.index(first) :]
        assert best_again == best
