"""Phase 1: train the dense model on the task."""

from typing import Any

from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.moe.conversion import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase


class FineTuning(OptimizedPhase):
    """Fine-tune the dense model on the task, optionally after a swap of its activation ("relufication").

    A model from a source whose head is for other labels than the data's gets a new one.

    Args:
        activation: Activation to put into every FFN first, e.g. ``relu``; the model's own if not given.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.
    """

    makes_head = True
    can_be_sharded = True

    def __init__(self, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = activation

    def transform_(self, model: nn.Module) -> None:
        if self.activation == "relu" and all(ffn.is_sparse for ffn in select_ffns(model)):
            if not next(model.parameters()).is_meta:  # and not in the checks beforehand
                notice(f"{type(model).__name__}: has ReLU already; activation=relu changes nothing.")
        elif self.activation is not None:
            swap_activation_(model, ActivationConfig(self.activation))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.task_loss(self.logits(batch), batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss
