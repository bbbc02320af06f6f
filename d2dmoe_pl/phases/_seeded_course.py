"""What a phase draws at random, and how it ends, whether or not it was interrupted on the way."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import Tensor

from d2dmoe_pl.data.epoch_order import folded, seed_generators
from d2dmoe_pl.phases._callback_checks import check_callbacks
from d2dmoe_pl.phases._schedule import accumulated_in

BETWEEN = "d2dmoe_between_validations"  # in a checkpoint


class SeededCourse(L.Callback):
    """Seed each training step, and the beginning of each evaluation, by where in the course of the phase it is.

    Nothing that was drawn before decides what is drawn then, so that a training which is resumed draws what it would
    have drawn. Every phase brings this callback along.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Tensor] = {}  # of a checkpoint that is gone on from

    def setup(self, trainer: Any, phase: Any, stage: str) -> None:
        check_callbacks(trainer.callbacks, phase)
        # with max_steps, Lightning counts epochs otherwise where it resumes, and samples and the last step are others
        trainer.fit_loop._iteration_based_training = _never

    def on_save_checkpoint(self, trainer: Any, phase: Any, checkpoint: dict[str, Any]) -> None:
        # Lightning keeps neither: what monitors go by between two validations, and that a training has ended early
        metrics = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint[BETWEEN] = {"metrics": metrics, "is_stopped": trainer.should_stop and not _is_out_of_time(trainer)}

    def on_load_checkpoint(self, trainer: Any, phase: Any, checkpoint: dict[str, Any]) -> None:
        between = checkpoint.get(BETWEEN, {})
        self._metrics = between.get("metrics", {})
        # who has taken it out wants to train on
        has_stopping = any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks)
        trainer.should_stop = phase.is_fitting and has_stopping and between.get("is_stopped", False)
        if trainer.strategy.restore_checkpoint_after_setup:
            # it is there already, since optimizers ask how long it is, and was not told where to go on, or its seed
            trainer.fit_loop._combined_loader = None

    def on_train_start(self, trainer: Any, phase: Any) -> None:
        trainer.callback_metrics.update(self._metrics)
        # resumed in the middle of an epoch, it would be told only as the next one begins
        trainer.accumulate_grad_batches = accumulated_in(trainer, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, phase: Any) -> None:
        self._seed(trainer, phase, "epoch")

    def on_train_batch_start(self, trainer: Any, phase: Any, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, phase, "step", batch_idx)

    def on_validation_epoch_start(self, trainer: Any, phase: Any) -> None:
        self._seed(trainer, phase, "validation")

    def on_test_epoch_start(self, trainer: Any, phase: Any) -> None:
        self._seed(trainer, phase, "test")

    def on_predict_epoch_start(self, trainer: Any, phase: Any) -> None:
        self._seed(trainer, phase, "predict")

    def on_fit_end(self, trainer: Any, phase: Any) -> None:
        phase.end_training()

    def _seed(self, trainer: Any, phase: Any, *parts: int | str) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed
        seed_generators(folded(phase.data.seed, *parts, epoch, trainer.global_rank))


def _is_out_of_time(trainer: Any) -> bool:
    timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
    left = [timer.time_remaining() for timer in timers]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def _never() -> bool:
    return False
