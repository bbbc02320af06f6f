"""What phases share that train parameters: an optimizer, and how its learning rate rises and falls."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from d2dmoe_pl.adapters import ModelSource
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.phases._phase import Phase
from d2dmoe_pl.phases._schedule import TrainingSchedule
from d2dmoe_pl.phases._sharding import average_gradients_
from d2dmoe_pl.phases._slow_types import say_if_slow

OptimizerFactory = Callable[[Iterable], torch.optim.Optimizer]


class OptimizedPhase(Phase):
    """A phase that trains parameters.

    Args:
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained or new model, instead of ``init_from``.
        optimizer: Any class of ``torch.optim``, with its arguments; biases and norms are not decayed.
        warmup: Share of the training over which the learning rate rises linearly from 0.
        decay: How the learning rate falls to 0 after the warm-up: ``none``, ``linear`` or ``cosine``.

    Raises:
        ConfigError: If ``warmup`` is outside [0, 1]; to fit, for gradients clipped with a fused optimizer in mixed
            precision.
    """

    def __init__(
        self,
        init_from: str | None = None,
        source: ModelSource | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        warmup: float = 0.1,
        decay: Literal["none", "linear", "cosine"] = "linear",
    ) -> None:
        super().__init__(init_from, source)
        check(0.0 <= warmup <= 1.0, f"warmup={warmup}: must lie in [0, 1], a share of the training")
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.warmup = warmup
        self.decay = decay
        self._was_trained: bool | None = None  # until the first step

    def learning_rate(self, name: str) -> float | None:
        """What the learning rate of the parameter ``name`` rises to; None for the optimizer's own."""
        return None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        vectors = ("bias", "norm_weight")  # experts keep vectors of their own as the rows of a matrix
        groups: dict[tuple, list[nn.Parameter]] = {}  # by what they have of their own
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.dim() >= 2 and not name.endswith(vectors)
                own = {"weight_decay": None if decayed else 0.0, "lr": self.learning_rate(name)}
                given = tuple((key, value) for key, value in own.items() if value is not None)
                groups.setdefault(given, []).append(parameter)
        optimizer = made(self.optimizer, [{"params": trained, **dict(given)} for given, trained in groups.items()])
        clipped, mixed = self.trainer.gradient_clip_val, isinstance(self.trainer.precision_plugin, MixedPrecision)
        check(
            not (clipped and mixed and optimizer.defaults.get("fused")),
            f"gradient_clip_val={clipped}: must be null with fused=True in mixed precision, or fused false",
        )
        say_if_slow(self.trainer)
        schedule = TrainingSchedule(optimizer, self.trainer, self.warmup, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def progress(self) -> float:
        """How much of the training is done, in [0, 1], as the learning rate goes by; 1 if nothing says how long it is.

        Every process must ask at once, before a step.
        """
        schedule = self._placed_schedule()
        share = None if schedule is None else schedule.share()
        return 1.0 if share is None else min(1.0, share)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._placed_schedule()
        average_gradients_(self)
        if not self._was_trained:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._was_trained = any(parameter.grad is not None for parameter in parameters)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def _placed_schedule(self) -> TrainingSchedule | None:
        """The schedule, where it is in the training; None for a phase that configures optimizers of its own."""
        schedule = self.lr_schedulers()
        if not isinstance(schedule, TrainingSchedule):
            return None
        schedule.place()
        return schedule

    def end_training(self) -> None:
        """As of every phase, unless all steps were without a loss, which a trainer passes over."""
        name = type(self).__name__
        check(self._was_trained is not False, f"{name}: nothing was trained; training_step must return the loss")
        super().end_training()


def check_optimizer(optimizer: OptimizerFactory) -> None:
    """Raise ``ConfigError`` unless an optimizer takes its settings, and its learning rate is a number."""
    rate = made(optimizer, [nn.Parameter(torch.zeros(1, 1))]).defaults.get("lr", 0.0)  # some take matrices only
    check(math.isfinite(rate), f"lr={rate}: must be finite")


def made(optimizer: OptimizerFactory, parameters: Sequence[Any]) -> torch.optim.Optimizer:
    """The optimizer of ``parameters``, or of groups of them; raises ``ConfigError`` if it does not take them."""
    try:
        return optimizer(parameters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {' '.join(str(error).split())}") from error


def freeze_(module: nn.Module, trained: Sequence[nn.Module] = ()) -> None:
    """Put ``module`` into evaluation mode without gradients, all but the modules in ``trained``."""
    module.eval().requires_grad_(False)
    for part in trained:
        part.train().requires_grad_(True)
