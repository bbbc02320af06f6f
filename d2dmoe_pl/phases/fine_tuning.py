"""Phase 1: train the dense model on the task."""

from typing import Any

from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._hidden_states import HiddenStateKeeping
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase


class FineTuning(OptimizedPhase):
    """Fine-tune the dense model on the task, optionally after a swap of its activation ("relufication").

    A model from a source whose head is for other labels than the data's gets a new one.

    Args:
        activation: Activation to put into every FFN first, e.g. ``relu``; the model's own if not given.
        hidden_weight: Weight of how far hidden states go from those before this phase, and before the swap, relative to
            their size. What a model learnt from far more data than there is here is kept so; it doubles the cost of
            the forward pass.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: If ``hidden_weight`` is negative, or the model's hidden states cannot be told.
    """

    makes_head = True
    can_be_sharded = True

    def __init__(self, activation: str | None = None, hidden_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = activation
        self._kept = HiddenStateKeeping(hidden_weight)

    def transform_(self, model: nn.Module) -> None:
        self._kept.begin(model, self)
        if self.activation == "relu" and all(ffn.is_sparse for ffn in select_ffns(model)):
            if not next(model.parameters()).is_meta:  # and not in the checks beforehand
                notice(f"{type(model).__name__}: has ReLU already; activation=relu changes nothing.")
        elif self.activation is not None:
            swap_activation_(model, ActivationConfig(self.activation))

    def on_fit_start(self) -> None:
        self._kept.place(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, kept = self._kept(self.model, batch)
        loss = self.task_loss(logits, batch)
        for name, part in kept.items():
            self.log(f"train/{name}", part.detach())
            loss = loss + self._kept.weight * part
        self.log("train/loss", loss, prog_bar=True)
        return loss
