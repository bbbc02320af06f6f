"""What is logged twice is shown once."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.adapters import TimmModel
from d2dmoe_pl.callbacks import PurgeRepeatedSteps
from d2dmoe_pl.data import Digits
from d2dmoe_pl.phases import FineTuning

TINY = TimmModel("vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2)


@pytest.mark.parametrize(("callbacks", "twice"), [([PurgeRepeatedSteps()], [4]), ([], [4, 5, 6])])
def test_a_resumed_training_is_one_curve(trainer, tmp_path, callbacks, twice):
    def train(max_steps, ckpt_path=None):
        torch.manual_seed(0)
        run = trainer(
            logger=TensorBoardLogger(tmp_path, name="", version=""),
            callbacks=[ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1), *callbacks],
            enable_checkpointing=True,
            max_epochs=-1,
            max_steps=max_steps,
            log_every_n_steps=1,
            limit_val_batches=0,
        )
        run.fit(FineTuning(source=TINY), datamodule=Digits(batch_size=8), ckpt_path=ckpt_path)

    train(7)
    train(10, tmp_path / "step=4.ckpt")
    shown = EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in shown.Scalars("train/loss")]
    assert set(range(10)) == set(steps)
    assert [step for step in range(10) if steps.count(step) > 1] == twice


class KilledError(Exception):
    """In the place of a signal."""


class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            raise KilledError


def test_the_rows_before_a_resumption_stay_in_a_file(trainer, tmp_path):
    """Those that were written since the checkpoint go, and come again; what was logged before it was on the disk."""

    def train(folder, ckpt_path=None, *more):
        torch.manual_seed(0)
        logger, purging = CSVLogger(tmp_path, name=folder, version=""), PurgeRepeatedSteps()
        purging.read([logger])
        run = trainer(
            logger=logger,
            callbacks=[
                ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1),
                purging,
                *more,
            ],
            enable_checkpointing=True,
            max_epochs=4,
            log_every_n_steps=1,
            limit_train_batches=3,
            limit_val_batches=1,
            num_sanity_val_steps=0,
        )
        run.fit(FineTuning(source=TINY), datamodule=Digits(batch_size=8), ckpt_path=ckpt_path)
        return rows(folder)

    def rows(folder):
        with (tmp_path / folder / "metrics.csv").open(newline="") as opened:
            return list(csv.DictReader(opened))

    whole = train("whole")
    with pytest.raises(KilledError):
        train("resumed", None, Kill())
    before = rows("resumed")
    assert before == whole[: len(before)]
    assert len(before) >= 4  # they are kept in memory else, a hundred at a time
    with (tmp_path / "resumed" / "metrics.csv").open("a") as opened:
        opened.write("1,1")  # of a row of step 12, in the middle of which a run was killed
    assert train("resumed", tmp_path / "step=4.ckpt") == whole
    assert train("resumed") == whole  # another training, in the place of the first
