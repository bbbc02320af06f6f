"""A training that is interrupted and resumed is one curve in TensorBoard."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class PurgeRepeatedSteps(L.Callback):
    """Has TensorBoard forget what was logged behind the checkpoint that a training is resumed from.

    These steps are done again; without this, each would be shown twice, and lines would go back in time.
    """

    def on_train_start(self, trainer: Any, phase: L.LightningModule) -> None:
        if trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        behind = trainer.global_step + 1  # at the step itself are the pictures of an epoch that is not done again
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                start = Event(step=behind, session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(start)
