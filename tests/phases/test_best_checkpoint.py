"""Where a metric is monitored, the best epoch is what goes on, and is what the artifact says."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from digits_models import digits_source, state
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import Digits
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RecoveryTuning, RouterRegression


class Worse(FineTuning):
    """Gets better for two epochs, by what it logs, and worse from then on; each epoch has weights of its own."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("quality", float([1, 3, 2, 0, 3][self.current_epoch]))  # the last is looked at once it is over


class Keep(SaveArtifact):
    """Notes the weights that each epoch ends with."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, phase):
        self.epochs.append(state(phase.model))


def fitted(trainer, phase, keep, *more, **kwargs):
    callbacks = [keep, *more]
    runner = trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True, num_sanity_val_steps=0, **kwargs)
    runner.fit(phase, datamodule=Digits(16))
    return runner


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def monitored(tmp_path, **kwargs):
    return ModelCheckpoint(tmp_path / "best", monitor="quality", mode="max", **kwargs)


def record(tmp_path):
    return json.loads((tmp_path / "run" / "artifact" / "config.json").read_text())["d2dmoe"]["history"][-1]


@pytest.mark.parametrize("kwargs", [{}, {"save_top_k": -1}, {"save_last": True}, {"save_weights_only": True}])
def test_the_best_epoch_goes_on(trainer, tmp_path, caplog, kwargs):
    keep = Keep()
    phase = Worse(source=digits_source())
    fitted(trainer, phase, keep, monitored(tmp_path, **kwargs))
    assert same(load_model(tmp_path / "run" / "artifact"), keep.epochs[1])
    assert not same(phase.model, keep.epochs[-1])
    assert record(tmp_path)["metrics"]["quality"] == 3.0
    said = [message for message in caplog.messages if "goes on" in message]
    assert len(said) == 1
    assert said[0].startswith("Epoch 2 goes on, the best by quality: 3 (epoch=1-step=8")


def test_with_early_stopping(trainer, tmp_path):
    keep = Keep()
    stop = EarlyStopping("quality", mode="max", patience=1)
    runner = fitted(trainer, Worse(source=digits_source()), keep, monitored(tmp_path), stop)
    assert runner.current_epoch == 3
    assert same(load_model(tmp_path / "run" / "artifact"), keep.epochs[1])


@pytest.mark.parametrize("place", ["", "copied", "renamed"])
def test_after_a_resumption(trainer, tmp_path, place):
    keep = Keep()
    last = ModelCheckpoint(tmp_path / "begun" / "last", filename="last", save_on_train_epoch_end=True)
    broken = Worse(source=digits_source())
    step = broken.training_step

    def breaks(batch, batch_idx):
        if broken.current_epoch == 3:
            raise RuntimeError("broken off")
        return step(batch, batch_idx)

    broken.training_step = breaks
    with pytest.raises(RuntimeError, match="broken off"):
        fitted(trainer, broken, keep, monitored(tmp_path / "begun"), last)
    folder = tmp_path / (place or "begun")
    if place:
        shutil.copytree(tmp_path / "begun", folder)
    if place == "renamed":
        shutil.rmtree(tmp_path / "begun")
    phase = Worse(source=digits_source())
    runner = trainer(callbacks=[SaveArtifact(), monitored(folder)], max_epochs=4, enable_checkpointing=True)
    runner.fit(phase, datamodule=Digits(16), ckpt_path=str(folder / "last" / "last.ckpt"), weights_only=False)
    assert same(load_model(tmp_path / "run" / "artifact"), keep.epochs[1])
    [best] = runner.checkpoint_callback.best_k_models
    assert best == runner.checkpoint_callback.best_model_path
    assert Path(best).parent == folder / "best"


def test_without_a_metric_the_last_goes_on(trainer, tmp_path, caplog):
    keep = Keep()
    fitted(trainer, Worse(source=digits_source()), keep)
    assert same(load_model(tmp_path / "run" / "artifact"), keep.epochs[-1])
    assert not [message for message in caplog.messages if "goes on" in message]
    assert record(tmp_path)["metrics"].keys() >= {"validation/accuracy", "validation/loss"}


def test_a_metric_that_was_never_judged(trainer, tmp_path, caplog):
    keep = Keep()
    fitted(trainer, Worse(source=digits_source()), keep, monitored(tmp_path), limit_val_batches=0)
    assert same(load_model(tmp_path / "run" / "artifact"), keep.epochs[-1])
    assert "No checkpoint of the best quality is there: the last epoch goes on." in caplog.messages


def test_what_is_recorded_is_of_the_epoch_that_goes_on(trainer, tmp_path):
    fitted(trainer, Worse(source=digits_source()), Keep(), monitored(tmp_path), limit_val_batches=1.0)
    phase = FineTuning(init_from=str(tmp_path / "run" / "artifact"))
    (found,) = trainer(limit_val_batches=1.0).validate(phase, datamodule=Digits(16), verbose=False)
    recorded = record(tmp_path)["metrics"]
    assert recorded == pytest.approx({"quality": 3.0, **found})
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_what_recovery_records_is_of_the_weights_that_go_on(trainer, tmp_path, artifact, caplog):
    torch.manual_seed(0)
    phase = RecoveryTuning(init_from=artifact("routed"), optimizer=partial(torch.optim.SGD, lr=5.0))
    sweep = TauSweep([0.5, 1.0])
    settings = {"callbacks": [SaveArtifact(), sweep], "limit_val_batches": 1.0, "max_epochs": 2}
    trainer(limit_train_batches=1.0, **settings).fit(phase, datamodule=Digits(16))
    assert "those before go on" in next(message for message in caplog.messages if message.startswith("Of the weights"))
    recorded, rows = record(tmp_path)["metrics"], sweep.rows["validation"]
    again = RecoveryTuning(init_from=str(tmp_path / "run" / "artifact"))
    settings["callbacks"] = [TauSweep([0.5, 1.0])]
    (found,) = trainer(**settings).validate(again, datamodule=Digits(16), verbose=False)
    assert recorded == pytest.approx(found)
    assert [row.loss for row in rows] == pytest.approx(
        [row.loss for row in settings["callbacks"][0].rows["validation"]]
    )


class TestGates:
    """What is recorded, evaluated and saved is of one gate."""

    def routed(self, trainer, tmp_path, tau):
        paths = []
        for phase in (FineTuning(source=digits_source(), activation="relu"), ExpertClustering(8)):
            phase.init_from = paths[-1] if paths else None
            trainer(callbacks=[SaveArtifact()], default_root_dir=tmp_path).fit(phase, datamodule=Digits(16))
            (tmp_path / "run" / "artifact").rename(tmp_path / f"{len(paths)}")
            paths.append(str(tmp_path / f"{len(paths)}"))
        phase = RouterRegression(8, tau=tau, init_from=paths[-1])
        runner = trainer(callbacks=[SaveArtifact()], limit_val_batches=1.0)
        runner.fit(phase, datamodule=Digits(16))
        return runner, phase

    def taus(self, phase):
        return {layer.gate and layer.gate.config.tau for layer in moe_layers(phase.model).values()}

    def test_validation_is_recorded_with_the_gate_that_is_saved(self, trainer, tmp_path):
        runner, phase = self.routed(trainer, tmp_path, tau=0.0)
        recorded = {key: value for key, value in record(tmp_path)["metrics"].items() if key.startswith("validation")}
        (again,) = runner.validate(phase, datamodule=Digits(16), verbose=False)
        assert recorded == pytest.approx({key: again[key] for key in recorded})
        artifact = str(tmp_path / "run" / "artifact")
        (loaded,) = trainer(limit_val_batches=1.0).validate(
            RouterRegression(8, init_from=artifact), datamodule=Digits(16), verbose=False
        )
        assert loaded == pytest.approx(again)

    def test_an_evaluation_keeps_what_was_saved_unless_it_is_told(self, trainer, tmp_path, caplog):
        self.routed(trainer, tmp_path, tau=0.4)
        artifact = str(tmp_path / "run" / "artifact")
        for given, tau in (({}, 0.4), ({"tau": 0.4}, 0.4), ({"tau": 0.7}, 0.7), ({"rule": "dynk_cumulative"}, 0.4)):
            caplog.clear()
            phase = RouterRegression(8, init_from=artifact, **given)
            trainer(limit_test_batches=1).test(phase, datamodule=Digits(16), verbose=False)
            assert self.taus(phase) == {tau}
            said = [message for message in caplog.messages if message.startswith("Evaluated with")]
            assert bool(said) == (given in ({"tau": 0.7}, {"rule": "dynk_cumulative"}))
