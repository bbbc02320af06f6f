"""What phases share that train nothing and walk through the training split once, in order."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from d2dmoe_pl.errors import check
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._phase import Phase

PASS = "ordered_pass"  # key in checkpoints


class OrderedPass(Phase):
    """A phase that gathers statistics of the model at rest over ordered, unaugmented training samples, in one epoch.

    Attributes:
        seen: Samples that this process has been given so far; subclasses :meth:`advance` it.
    """

    takes_samples_in_order: ClassVar[bool] = True
    seen: int = 0
    _resumed: dict[str, Any] | None = None

    def sums(self) -> Mapping[str, Tensor]:
        """The statistics of this process by name, each of which adds up over processes, and is changed in place."""
        return {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timers: dict[Timer, float | None] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.automatic_optimization = False
        trainer: Any = self.trainer
        trainer.fit_loop.max_epochs = 1
        # once, at the end, whatever is set for trainings; an interval of batches can be more than there are
        trainer.check_val_every_n_epoch, trainer.val_check_interval = 1, 1.0
        for timer in (each for each in trainer.callbacks if isinstance(each, Timer) and stage == "fit"):
            if timer._duration is not None:
                notice(f"max_time: {type(self).__name__} goes on to its end; a part of its samples would be wrong.")
            self._timers[timer], timer._duration = timer._duration, None

    def teardown(self, stage: str) -> None:
        for timer, duration in self._timers.items():
            timer._duration = duration
        self._timers.clear()

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    def on_fit_start(self) -> None:
        self.model.eval()
        self.seen = 0
        self.begin()
        if self._resumed is not None:
            self.seen = self._resumed["seen"]
            for name, value in self.sums().items():
                # of all processes together
                value.copy_(self._resumed["sums"][name] if self.trainer.is_global_zero else torch.zeros_like(value))
            self._resumed = None

    def begin(self) -> None:
        """Set all statistics to zero."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        reduce = self.trainer.strategy.reduce
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        checkpoint[PASS] = {
            "seen": self.seen,
            "world_size": self.trainer.world_size,
            "is_done": epochs.processed > 0,
            "sums": {name: reduce(value.clone(), reduce_op="sum").cpu() for name, value in self.sums().items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved: dict[str, Any] = checkpoint.get(PASS, {})
        now = self.trainer.world_size
        check(bool(saved), f"ckpt_path: has no statistics of {type(self).__name__}; must be one that it wrote")
        check(
            saved["is_done"] or saved["world_size"] == now,
            f"devices={now}: a pass in order goes on from its middle only as it was begun, with {saved['world_size']}; "
            "without ckpt_path it begins anew",
        )
        self._resumed = saved

    @property
    def num_training_samples(self) -> int:
        return self.data.num_training_samples

    def sample_numbers(self, size: int) -> Tensor:
        """Which samples of the split the next ``size`` ones of this process are: ``(size,)`` int64, on the CPU.

        A distributed sampler deals samples out in turn, and repeats some at the end so that all processes get equally
        many; repeated ones have numbers from :attr:`num_training_samples` on.
        """
        return (self.seen + torch.arange(size)) * self.trainer.world_size + self.trainer.global_rank

    def advance(self, size: int) -> None:
        """Go on to the next batch, after one of ``size`` samples."""
        self.seen += size
