"""What a user may set of a trainer: every phase runs with it, or refuses it in a line."""

import pytest
import tiny
import torch
from digits_models import digits_source
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from recipe import write_recipe

from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    FineTuning,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
    StandInFitting,
)


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
    )

    @pytest.mark.parametrize(("callback", "message"), MESSAGES)
    def test_in_code(self, trainer, digits, callback, message):
        with pytest.raises(ConfigError, match=message):
            trainer(callbacks=[callback]).fit(FineTuning(source=digits_source()), datamodule=digits)

    def test_by_a_tuner(self, trainer, digits):
        with pytest.raises(ConfigError, match=r"^callbacks=BatchSizeFinder: must be left out"):
            Tuner(trainer()).scale_batch_size(FineTuning(source=digits_source()), datamodule=digits)

    def test_on_the_command_line_before_anything_is_loaded(self, tmp_path, capsys):
        recipe = write_recipe(tmp_path / "recipe.yaml")
        callback = '--trainer.callbacks+={"class_path": "BatchSizeFinder"}'
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--config", f"{recipe}:fine_tuning", f"--trainer.default_root_dir={tmp_path}/run", callback])
        assert exit_info.value.code == 2
        assert "error: callbacks=BatchSizeFinder: must be left out" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


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
