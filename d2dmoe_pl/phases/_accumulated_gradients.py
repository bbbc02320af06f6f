"""Gradients that wait for more batches before there is a step, kept in checkpoints that are written in between."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from d2dmoe_pl.sharded_tensors import is_sharded_tensor, sharded_like, whole_on_cpu

GRADIENTS = "accumulated_gradients"  # key in checkpoints


class AccumulatedGradients(L.Callback):
    """Let a training that accumulates gradients go on from any checkpoint as if it had not been interrupted.

    With ``accumulate_grad_batches``, validations and callbacks can save after batches that no step has followed yet.
    Lightning keeps weights alone, so that the step after a resumption would be of the last of its batches. Every phase
    brings this callback along.
    """

    def __init__(self) -> None:
        self._resumed: Mapping[str, Tensor] = {}

    def on_save_checkpoint(self, trainer: Any, phase: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if phase.automatic_optimization and trainer.fit_loop.epoch_loop._should_accumulate():
            checkpoint[GRADIENTS] = _mean_gradients(trainer, phase)

    def on_load_checkpoint(self, trainer: Any, phase: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint.get(GRADIENTS, {})

    def on_train_start(self, trainer: Any, phase: L.LightningModule) -> None:
        for name, parameter in phase.named_parameters():
            if name in self._resumed:
                parameter.grad = sharded_like(self._resumed[name], parameter)
        self._resumed = {}


@torch.no_grad()
def _mean_gradients(trainer: Any, phase: L.LightningModule) -> dict[str, Tensor]:
    """Gradients by parameter, the mean of all processes', each of which has its own until there is a step."""
    trained = {name: parameter for name, parameter in phase.named_parameters() if parameter.requires_grad}
    there = torch.tensor([parameter.grad is not None for parameter in trained.values()], device=phase.device)
    there = trainer.strategy.reduce(there.float(), reduce_op="sum") > 0  # the same on every process
    gradients: dict[str, Tensor] = {}
    for (name, parameter), is_there in zip(trained.items(), there.tolist(), strict=True):
        if is_there:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if not is_sharded_tensor(own):  # FSDP2 takes the mean after each batch
                own = trainer.strategy.reduce(own.clone(), reduce_op="mean")
            kept = whole_on_cpu(own)
            assert kept is not None
            gradients[name] = kept
    return gradients
