"""What a user may set of a trainer: every phase runs with it, or refuses it in a line."""

import json
import pickle

import pytest
import tiny
import torch
import yaml
from digits_models import digits_source
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner
from recipe import write_recipe

from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    CutoffFitting,
    FineTuning,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
    StandInFitting,
)
from d2dmoe_pl.signals import leave_signals_to_us


@pytest.mark.parametrize("settings", [{"log_every_n_steps": 0}, {"precision": "64-true"}], ids=str)
@pytest.mark.parametrize(
    ("make", "stage"),
    [
        (AttentionDistillation, "dense"),
        (SparsityEnforcement, "dense"),
        (RouterRegression, "experts"),
        (lambda **start: RecoveryTuning(num_held_out=0, **start), "routed"),
    ],
)
def test_nothing_logged_by_layer_and_a_wide_type(trainer, digits, artifact, make, stage, settings):
    run = trainer(limit_train_batches=1, **settings)
    run.fit(make(init_from=artifact(stage)), datamodule=digits)
    assert run.global_step == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 5},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda start: CutoffFitting(num_tokens=100, init_from=start),
        lambda start: StandInFitting(rank=2, num_tokens=100, init_from=start),
        lambda start: BudgetCalibration(num_samples=20, num_scored_samples=20, num_scored_points=2, init_from=start),
    ],
)
def test_a_pass_is_validated_at_its_end(trainer, digits, artifact, make, settings):
    phase = make(artifact("routed"))
    trainer(**settings).fit(phase, datamodule=digits)
    assert phase.measured.keys() == {"validation/loss", "validation/accuracy"}


class TestCallbacksThatNoPhaseCanRunWith:
    MESSAGES = (
        (StochasticWeightAveraging(1e-3), r"^callbacks=StochasticWeightAveraging: must be WeightAveraging or EMA"),
        (
            BatchSizeFinder(),
            r"^callbacks=BatchSizeFinder: must be left out; batch_size and lr are set by hand",
        ),
        (LearningRateFinder(), r"^callbacks=LearningRateFinder: must be left out; batch_size and lr are set"),
        (ModelPruning("l1_unstructured"), r"^callbacks=ModelPruning: must be left out; what is trained or pruned is"),
    )

    @pytest.mark.parametrize(("callback", "message"), MESSAGES)
    def test_in_code(self, trainer, digits, callback, message):
        with pytest.raises(ConfigError, match=message):
            trainer(callbacks=[callback]).fit(FineTuning(source=digits_source()), datamodule=digits)

    def test_by_a_tuner(self, trainer, digits):
        with pytest.raises(ConfigError, match=r"^callbacks=BatchSizeFinder: must be left out"):
            Tuner(trainer()).scale_batch_size(FineTuning(source=digits_source()), datamodule=digits)

    @pytest.mark.parametrize(
        ("callback", "said"),
        [
            ({"class_path": "BatchSizeFinder"}, "callbacks=BatchSizeFinder: must be left out"),
            ({"class_path": "BackboneFinetuning"}, "callbacks=BackboneFinetuning: must be left out"),
            (
                {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
                "callbacks=ModelCheckpoint: must differ from others, and from that of every phase, which keeps the "
                "last epoch, in monitor, mode, every_n_epochs, every_n_train_steps or train_time_interval\n",
            ),
            (
                {"class_path": "ModelCheckpoint", "init_args": {"monitor": "validation/loss", "filename": "last"}},
                "callbacks=ModelCheckpoint: filename='last' is that of another too, and one would be written in the ",
            ),
        ],
    )
    def test_on_the_command_line_before_anything_is_loaded(self, tmp_path, capsys, callback, said):
        assert f"error: {said}" in refused(tmp_path, capsys, f"--trainer.callbacks+={json.dumps(callback)}")
        assert not (tmp_path / "run").exists()


def fine_tune(tmp_path, *settings):
    """Fine-tune as the command line does, for an epoch of one batch."""
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
    few = ["--trainer.limit_train_batches=1", f"--trainer.default_root_dir={tmp_path}/run"]
    main(["fit", "--config", f"{recipe}:fine_tuning", *few, *settings])


def refused(tmp_path, capsys, *settings):
    """What is said to settings that are refused."""
    with pytest.raises(SystemExit) as exit_info:
        fine_tune(tmp_path, *settings)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


class OwnLogger(DummyLogger):
    """It has no folder."""


def test_a_logger_that_has_no_folder(tmp_path, capsys):
    said = refused(tmp_path, capsys, f"--trainer.logger={__name__}.OwnLogger")
    assert said.endswith(
        "error: logger=OwnLogger: has no save_dir, where a phase would leave what it makes; must come behind one that "
        "has, such as TensorBoardLogger\n"
    )


def test_no_checkpoints(tmp_path):
    fine_tune(tmp_path, "--trainer.enable_checkpointing=false", "--trainer.logger=false")
    assert read_artifact(tmp_path / "run" / "artifact").stage == "dense"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_timer_whose_default_is_a_word_of_a_list(tmp_path):
    timer = {"class_path": "Timer", "init_args": {"duration": "00:01:00:00"}}
    fine_tune(tmp_path, f"--trainer.callbacks+={json.dumps(timer)}", "--trainer.logger=false")
    (kept,) = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["callbacks"]
    assert kept["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}


@pytest.mark.parametrize(("command", "key"), [("test", "test"), ("validate", "val"), ("predict", "predict")])
def test_an_evaluation_of_nothing(tmp_path, capsys, command, key):
    recipe = write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--config", f"{recipe}:fine_tuning", f"--trainer.limit_{key}_batches=0"])
    assert exit_info.value.code == 2
    said = f"error: limit_{key}_batches=0: {command} would do nothing; must not be 0\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_trainer_can_be_taken_to_processes_that_are_spawned(trainer):
    run = trainer()
    leave_signals_to_us(run)
    assert pickle.loads(pickle.dumps(run._signal_connector._sigterm_notifier_fn)) is not None


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, r"^optimizer: LBFGS doesn't support per-parameter options"),
        (torch.optim.Muon, r"^optimizer: Muon only supports 2D parameters"),
    ],
)
def test_an_optimizer_that_does_not_take_the_parameters(trainer, optimizer, message):
    phase = FineTuning(source=tiny.SOURCES["bert"](), optimizer=optimizer)
    with pytest.raises(ConfigError, match=message):
        trainer().fit(phase, datamodule=tiny.TextData(8))
