"""Calling a model without changing how it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give the modules of ``model`` back the parts and plain settings that they had, whatever calls have changed.

    Some choose how they compute by a call's shapes, and keep to it (BigBird's attention, for short texts).
    """
    kept = [
        (module, dict(module._modules), {name: value for name, value in vars(module).items() if _is_plain(value)})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, parts, settings in kept:
            module._modules.clear()
            module._modules.update(parts)
            vars(module).update(settings)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
