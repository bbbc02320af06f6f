"""A NaN loss ends the run while the weights are still good."""

import lightning as L
import torch
from torch import Tensor

from d2dmoe_pl.errors import NonFiniteLossError


class StopOnNonFinite(L.Callback):
    """Raise before the backward pass of a NaN or infinite loss, so that neither weights nor checkpoints are touched.

    Raises:
        NonFiniteLossError: Names the phase, the step and the last good checkpoint.
    """

    def on_before_backward(self, trainer: L.Trainer, phase: L.LightningModule, loss: Tensor) -> None:
        if torch.isfinite(loss).all():
            return
        last = getattr(trainer.checkpoint_callback, "best_model_path", "")
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise NonFiniteLossError(
            f"{type(phase).__name__}: the loss is {loss.item()} at step {trainer.global_step}; stopped, {kept}. "
            "A smaller learning rate (optimizer) or gradient clipping (trainer.gradient_clip_val) may help"
        )
