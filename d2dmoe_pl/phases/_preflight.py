"""Will these phases work on this model? Answered from shapes, before anything long runs."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lightning.pytorch.strategies import Strategy
from torch import nn

from d2dmoe_pl.artifact import build_structure
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.free_memory import check_fits
from d2dmoe_pl.phases._model_checks import (
    change_in_place,
    check_head,
    check_length,
    check_pictures,
    check_recordings,
    check_token_ids,
)
from d2dmoe_pl.phases._phase import Phase
from d2dmoe_pl.phases._sharding import parts_models
from d2dmoe_pl.structure import describe, stage_of


@runtime_checkable
class ChecksModel(Protocol):
    """A callback that can tell beforehand whether it will work."""

    def check_model(self, phase: Phase, model: nn.Module) -> None:
        """Raise ``ConfigError`` unless it will, on ``model`` as ``phase`` leaves it, on the meta device."""


def preflight(
    phases: Sequence[Phase],
    data: Sequence[TaskData] = (),
    strategy: Strategy | None = None,
    callbacks: Sequence[Sequence[object]] = (),
) -> None:
    """Take the first phase's model through all ``phases`` on the meta device.

    Of what is on the hub, only descriptions are fetched, but for a teacher: a model's configuration, and tokenizers or
    image processors.

    Args:
        phases: In order; each after the first starts from what the one before leaves.
        data: The phases' data; if left out, neither it nor the memory is looked at.
        strategy: Of the first phase's trainer, if there is one. Where it parts a model among processes, an artifact
            need not fit into the memory.
        callbacks: Of each phase's trainer.

    Raises:
        ConfigError: If a phase, or a callback, does not fit what it would start from, the model has not the head, the
            positions or the token ids that the data needs or does not fit into the memory, or one of the descriptions
            is not there.
    """
    model, came_from, beside = _start(phases[0])
    is_mapped = phases[0].init_from is not None and parts_models(strategy)
    if data and not is_mapped:
        check_fits(model, "source" if phases[0].init_from is None else f"init_from={str(phases[0].init_from)!r}")
    for each in data:
        check_head(model, each.head)
        check_length(model, each.sample_length)
        each.load_processor()
        check_token_ids(model, each.num_token_ids)
        check_pictures(model, each.preprocessing)
        check_recordings(model, each)
    for phase, own in zip(phases, callbacks or [()] * len(phases), strict=True):
        phase.check_start(stage_of(describe(model)), came_from, beside)
        change_in_place(phase.transform_, model)
        change_in_place(phase.finish_, model)
        for callback in own:
            if isinstance(callback, ChecksModel):
                callback.check_model(phase, model)
        came_from, beside = type(phase).__name__, phase.leaves


def _start(phase: Phase) -> tuple[nn.Module, str, Sequence[str]]:
    artifact = phase.read_start()
    if artifact is None:
        assert phase.source is not None
        return phase.source.build_structure(["0", "1"]), "a source", ()  # the data, and with it the labels, come later
    return build_structure(artifact), artifact.phase, artifact.tensors
