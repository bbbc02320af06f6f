"""A NaN ends the run while there is something good left."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from d2dmoe_pl.errors import NonFiniteLossError
from d2dmoe_pl.finite_weights import check_finite


class StopOnNonFinite(L.Callback):
    """Stop at a NaN or an infinity: in the loss before its backward pass, in weights before a checkpoint of them.

    So neither is kept, and the checkpoint before stays.

    Raises:
        NonFiniteLossError: Names the phase, the step and the last good checkpoint.
        NonFiniteWeightsError: Names the layer besides.
    """

    def on_before_backward(self, trainer: L.Trainer, phase: L.LightningModule, loss: Tensor) -> None:
        if torch.isfinite(loss).all():
            return
        raise NonFiniteLossError(
            f"{type(phase).__name__}: the loss is {loss.item()} at step {trainer.global_step}; stopped, "
            f"{_advice(trainer)}"
        )

    def on_save_checkpoint(self, trainer: L.Trainer, phase: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        what = f"the weights of {type(phase).__name__} at step {trainer.global_step}"
        check_finite(phase.named_parameters(), what, f"stopped, {_advice(trainer)}")


def _advice(trainer: L.Trainer) -> str:
    last = getattr(trainer.checkpoint_callback, "best_model_path", "")
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    remedy = "A smaller learning rate (optimizer) or gradient clipping (trainer.gradient_clip_val) may help"
    return f"{kept}. {remedy}"
