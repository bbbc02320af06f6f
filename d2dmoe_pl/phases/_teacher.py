"""A model to learn from."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import build_structure, load_model, read_artifact
from d2dmoe_pl.artifact_parts import Artifact
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.hub_folders import local_folder
from d2dmoe_pl.moe.conversion import set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._labels import check_same_head, check_same_outputs
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


def described_teacher(path: str, init_from: str | None, student: nn.Module) -> tuple[Artifact, nn.Module] | None:
    """What the artifact of a teacher says, and its model on the meta device.

    Args:
        path: Of the artifact.
        init_from: The artifact that the student starts from, if it does from one.
        student: The student, whose labels need not be known.

    Returns:
        None where an earlier phase of the student's chain has yet to leave it.

    Raises:
        ConfigError: If there is no artifact, or it predicts things of another kind.
    """
    chains = [Path(folder).resolve().parents[1:2] for folder in (path, init_from) if folder is not None]
    if chains[1:] == chains[:1] and not Path(path).exists():
        return None
    artifact = read_artifact(local_folder(path, argument="teacher"), "teacher")
    model = build_structure(artifact)
    check_same_head(model, student, f"teacher={path!r}")
    return artifact, model


def check_taught(path: str, init_from: str | None, student: nn.Module) -> None:
    """Raise ``ConfigError`` unless the outputs of a teacher stand for the student's labels; arguments as before."""
    described = described_teacher(path, init_from, student)
    if described is not None:
        check_same_outputs(described[1], student, f"teacher={path!r}")


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
