"""How the learning rate rises and falls in the course of a training, whatever ends it: epochs, steps or time."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2dmoe_pl.notices import notice


def learning_rate_factor(progress: float, warmup: float, decay: str) -> float:
    """What the learning rate is multiplied by after a share ``progress`` of the training, in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / max(1.0 - warmup, 1e-12)  # share of the decay that is done
    if decay == "linear":
        return max(0.0, 1.0 - rest)
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))
    return 1.0


class TrainingSchedule(LRScheduler):
    """A learning rate by the share of the training that is done.

    That is the share of the trainer's steps (``max_epochs``, ``max_steps``), or of its time (``max_time``) where that
    is further on. A training that nothing ends but a callback has no shares: its learning rate stays as it is. After a
    resumption with other steps an epoch, as on other devices, the share goes on from that of the epochs that are done.

    Args:
        optimizer: Its learning rates.
        trainer: What it does decides the share.
        warmup: Share of the training over which the learning rate rises linearly from 0; none where it is of less than
            a step.
        decay: How it falls to 0 afterwards: ``none``, ``linear`` or ``cosine``.
    """

    def __init__(self, optimizer: Optimizer, trainer: L.Trainer, warmup: float, decay: str) -> None:
        self.trainer = trainer
        self.warmup = warmup
        self.decay = decay
        self.total = planned_steps(trainer)
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        self._timer = next((timer for timer in timers if timer.time_remaining() is not None), None)
        self._start = (0, 0.0)  # steps and share from which both are counted on
        self._is_placed = False
        if not math.isfinite(self.total) and self._timer is None:
            notice(
                "The learning rate stays as it is, without warm-up or decay: neither max_epochs nor max_steps nor "
                "max_time says how long the training is."
            )
        super().__init__(optimizer)

    def share(self) -> float | None:
        """How much of the training is done, in [0, 1]; None if nothing says how long it is."""
        shares = []
        if math.isfinite(self.total):
            steps, share = self._start
            shares.append(share + (self.last_epoch - steps) / max(1, self.total))
        if self._timer is not None:
            remaining = self._timer.time_remaining()
            assert remaining is not None
            elapsed = self._timer.time_elapsed()
            # processes must not differ, and their clocks do
            shares.append(self.trainer.strategy.broadcast(elapsed / (elapsed + remaining)))
        return max(shares) if shares else None

    def get_lr(self) -> list[float | Tensor]:
        share = self.share()
        warmup = self.warmup if self.warmup * self.total >= 1 else 0.0  # of less than a step, it would be a step of 0
        factor = 1.0 if share is None else learning_rate_factor(share, warmup, self.decay)
        return [rate * factor for rate in self.base_lrs]

    def place(self) -> None:
        """Before a step: find out, once, where in the training it is, which a resumption may have changed."""
        if self._is_placed:
            return
        self._is_placed = True
        done = steps_done(self.trainer)
        if math.isfinite(self.total) and done is not None and done != self.last_epoch:
            self._start = (self.last_epoch, done / self.total)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate  # a checkpoint's is that of the training as it was planned then

    def state_dict(self) -> dict[str, Any]:
        """Where in the training it is; all else is the trainer's."""
        kept = ("last_epoch", "base_lrs", "_step_count", "_last_lr", "_start")
        return {key: self.__dict__[key] for key in kept if key in self.__dict__}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        known = {key: value for key, value in state_dict.items() if key in self.__dict__}
        self.__dict__.update(known)


def planned_steps(trainer: L.Trainer) -> float:
    """Steps of the whole training; infinite if nothing counts them."""
    estimated = trainer.estimated_stepping_batches  # with as many batches a step as now, and as many each epoch
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs < 0 or not math.isfinite(batches):
        return estimated if estimated >= 0 else math.inf
    steps = steps_of(trainer, max(1, epochs))
    return min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps


def steps_done(trainer: L.Trainer) -> int | None:
    """Steps that a training would have made by now, had all of its epochs been like this one.

    None where epochs do not end it, or have no known number of batches.
    """
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs < 0 or not math.isfinite(batches):
        return None
    if 0 <= trainer.max_steps < steps_of(trainer, epochs):
        return None
    now = trainer.current_epoch
    return steps_of(trainer, now) + trainer.fit_loop.epoch_loop.batch_idx // trainer.accumulate_grad_batches


def steps_of(trainer: L.Trainer, epochs: int) -> int:
    """Steps of the first epochs."""
    batches, accumulated = trainer.num_training_batches, _accumulated(trainer)
    begins = sorted(accumulated)
    spans = zip(begins, [*begins[1:], epochs], strict=True)
    return sum(max(0, min(end, epochs) - begin) * math.ceil(batches / accumulated[begin]) for begin, end in spans)


def accumulated_in(trainer: L.Trainer, epoch: int) -> int:
    """Batches whose gradients are accumulated for a step in an epoch."""
    accumulated = _accumulated(trainer)
    return accumulated[max(begin for begin in accumulated if begin <= epoch)]


def _accumulated(trainer: L.Trainer) -> dict[int, int]:
    """Batches whose gradients are accumulated for a step, by the epoch from which on so many are."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return schedulers[0].scheduling if schedulers else {0: trainer.accumulate_grad_batches}
