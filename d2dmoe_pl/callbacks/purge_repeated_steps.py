"""A training that is interrupted and resumed is one curve: in TensorBoard, and in CSV files."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class PurgeRepeatedSteps(L.Callback):
    """Has loggers forget what was logged behind the checkpoint that a training is resumed from, and nothing else.

    These steps are done again; without this, TensorBoard would show each twice, with lines that go back in time, and
    the file of a ``CSVLogger`` with a version would begin where the training is resumed. What is logged is on the disk
    before a checkpoint is.
    """

    def __init__(self) -> None:
        self._rows: dict[int, list[dict[str, str]]] = {}

    def read(self, loggers: Sequence[Logger]) -> None:
        """Remember what is in files that loggers will empty when a training begins."""
        for place, logger in enumerate(loggers):
            file = _file_of(logger)
            if file is not None and file.is_file():
                with file.open(newline="") as opened:
                    self._rows[place] = list(csv.DictReader(opened))

    def on_train_start(self, trainer: Any, phase: L.LightningModule) -> None:
        if trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        behind = trainer.global_step + 1  # at the step itself are the pictures of an epoch that is not done again
        for place, logger in enumerate(trainer.loggers):
            if isinstance(logger, TensorBoardLogger):
                start = Event(step=behind, session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(start)
            elif isinstance(logger, CSVLogger):
                # one that was being written when the run was killed has not all values
                whole = [row for row in self._rows.get(place, ()) if None not in row.values()]
                logger.experiment.metrics[:0] = [row for row in whole if int(row["step"]) < trainer.global_step]

    def on_save_checkpoint(self, trainer: Any, phase: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.save()


def _file_of(logger: Logger) -> Path | None:
    """What a logger writes to; None where it takes a new folder for each run, or writes elsewhere."""
    if not isinstance(logger, CSVLogger) or logger._version is None or "://" in logger.log_dir:
        return None
    return Path(logger.log_dir) / "metrics.csv"
