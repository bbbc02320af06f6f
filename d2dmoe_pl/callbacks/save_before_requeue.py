"""What a cluster takes away is saved between two steps."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

from d2dmoe_pl.signals import will_be_requeued


class SaveBeforeRequeue(L.Callback):
    """On a cluster's signal before it takes the machine away, save and requeue as Lightning does, but between steps.

    Lightning's own handler saves wherever the signal finds the training, in the middle of a step too, from where none
    goes on as if nothing had been. All processes save after the same step. Does nothing outside of SLURM.
    """

    def __init__(self) -> None:
        super().__init__()
        self._signum: int | None = None
        self._before: Any = None
        self._watched: int | None = None

    def on_fit_start(self, trainer: Any, phase: L.LightningModule) -> None:
        if not will_be_requeued(trainer) or threading.current_thread() is not threading.main_thread():
            return
        asked = trainer._accelerator_connector.cluster_environment.requeue_signal or signal.SIGUSR1
        if signal.getsignal(asked) in (None, signal.SIG_DFL):  # Lightning leaves a handler that is there, ours too
            self._watched = asked
            self._before = signal.signal(asked, self._note)

    def on_train_batch_end(
        self, trainer: Any, phase: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not loop._should_accumulate() and not loop._num_ready_batches_reached():
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Any, phase: L.LightningModule) -> None:
        self._save(trainer)

    def on_fit_end(self, trainer: Any, phase: L.LightningModule) -> None:
        self._unwatch()

    def on_exception(self, trainer: Any, phase: L.LightningModule, exception: BaseException) -> None:
        self._unwatch()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum

    def _save(self, trainer: Any) -> None:
        if self._watched is None:
            return
        came = self._signum is not None
        if trainer.strategy.reduce_boolean_decision(came, all=False):
            self._signum = None
            trainer._signal_connector._slurm_sigusr_handler_fn(self._watched, None)

    def _unwatch(self) -> None:
        if self._watched is not None:
            signal.signal(self._watched, self._before)
            self._watched = None
