"""Validation samples that a phase looks at on its own, beside Lightning's validation."""

from typing import Any

from torch import Tensor

from d2dmoe_pl.data.epoch_order import check_shares
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.phases._phase import Phase


def check_held_out(phase: Phase, **numbers: int) -> None:
    """Raise ``ConfigError`` unless every process gets some of so many samples, by the setting that says how many."""
    for setting, number in numbers.items():
        check_shares(min(number, phase.data.num_validation_samples), f"{setting}={number}")


def held_out(phase: Phase, num_samples: int) -> list[Batch]:
    """This process's share of so many validation samples, drawn at random but the same every time.

    Args:
        phase: In its trainer.
        num_samples: Over all processes.
    """
    loader = phase.data.drawn_loader("validation", num_samples)
    assert loader is not None  # splits to evaluate on are not streamed
    return list(loader)


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
