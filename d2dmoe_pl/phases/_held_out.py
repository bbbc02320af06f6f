"""Validation samples that a phase looks at on its own, beside Lightning's validation."""

from typing import Any

from torch import Tensor

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.phases._phase import Phase


def held_out(phase: Phase, num_samples: int) -> list[Batch]:
    """This process's share of the first so many validation samples.

    Args:
        phase: In its trainer.
        num_samples: Over all processes.
    """
    left = -(-num_samples // phase.trainer.world_size)
    loader = phase.data.val_dataloader()
    batches: list[Batch] = []
    for batch in loader[0] if isinstance(loader, list) else loader:
        batches.append({key: value[:left] for key, value in batch.items()})
        left -= len(batch["labels"])
        if left <= 0:
            break
    return batches


def moved(phase: Phase, batch: Any) -> dict[str, Tensor]:
    """A batch of the data as a step is given it."""
    strategy, precision = phase.trainer.strategy, phase.trainer.precision_plugin
    on_device: dict[str, Tensor] = strategy.batch_to_device(precision.convert_input(batch))
    return on_device


def summed(phase: Phase, value: Tensor) -> Tensor:
    """The sum over processes."""
    total = phase.trainer.strategy.reduce(value, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total
