"""A model to learn from."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.moe.conversion import set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._labels import check_same_outputs
from d2dmoe_pl.phases._optimized_phase import freeze_
from d2dmoe_pl.phases._sharding import shard_, shares_model

if TYPE_CHECKING:
    from d2dmoe_pl.phases._phase import Phase


class Teacher:
    """A model that runs without gradients, in evaluation mode, and is no part of the module that holds it.

    Being no module itself, it is neither among that module's parameters nor in its checkpoints, and is not moved along.

    Args:
        model: The model, which is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        freeze_(model)
        self.model = model

    def prepare(self, phase: "Phase") -> None:
        """Have the model in the type of the trainer's precision, and parted as the model of ``phase`` is."""
        with adapter_for(self.model).exact_buffers(self.model):
            self.model = phase.trainer.precision_plugin.convert_module(self.model)
        shard_(self.model, phase)

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """As :meth:`d2dmoe_pl.adapters.Adapter.logits`."""
        return adapter_for(self.model).logits(self.model, batch)

    @torch.no_grad()
    def run_layers(self, batch: Batch) -> None:
        """As :meth:`d2dmoe_pl.adapters.Adapter.run_layers`."""
        adapter_for(self.model).run_layers(self.model, batch)

    @torch.no_grad()
    def logits_and_hidden_states(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As :meth:`d2dmoe_pl.adapters.Adapter.logits_and_hidden_states`."""
        return adapter_for(self.model).logits_and_hidden_states(self.model, batch)


def read_teacher(phase: "Phase", path: str) -> Teacher:
    """The model of an artifact with every expert on, for ``phase`` to learn from.

    Raises:
        ConfigError: If its outputs are not those of the model of ``phase``.
    """
    model = load_model(path, mapped=shares_model(phase))
    check_same_outputs(model, phase.model, f"teacher={path!r}")
    if moe_layers(model):
        set_gate_(model, None)
    teacher = Teacher(model)
    teacher.prepare(phase)
    return teacher


def on_same_memory(model: nn.Module) -> nn.Module:
    """A model of its own modules and parameters, on the memory of ``model``; buffers are the very same."""
    same = {id(each): nn.Parameter(each.detach(), requires_grad=each.requires_grad) for each in model.parameters()}
    return copy.deepcopy(model, {**same, **{id(each): each for each in model.buffers()}})
