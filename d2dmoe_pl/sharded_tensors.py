"""Parameters that are parted among processes, and how they become whole, one at a time."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is parted among processes (a ``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has parameters that are parted among processes."""
    return any(map(is_sharded_tensor, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` without gradients, gathered if it is sharded, which every process must ask for at once."""
    values: Any = tensor.detach()
    gathered: Tensor = values.full_tensor() if is_sharded_tensor(values) else values
    return gathered


def whole_on_cpu(tensor: Tensor, wanted: bool = True) -> Tensor | None:
    """The values of ``tensor`` on the CPU; of a sharded one every process must ask at once.

    Args:
        tensor: Whole or sharded.
        wanted: Whether this process keeps it; None is given where it does not.
    """
    values = whole(tensor)
    return values.cpu() if wanted else None


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole ``value``, which every process has, on the device of ``other`` and sharded as that is."""
    target: Any = other
    if not is_sharded_tensor(target) or is_sharded_tensor(value):
        return value.to(target.device)
    distribute_tensor = resolve_name("torch.distributed.tensor:distribute_tensor")  # not every torch has it
    # every process has the value, so that nothing needs to be sent
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def without_gathering(model: nn.Module) -> Iterator[None]:
    """Let ``model`` be called in the body with tensors in the place of its parameters, in one process alone."""
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in sharded]
    for module in sharded:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in zip(sharded, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after


def is_finite(values: Tensor) -> bool:
    """Whether all numbers are finite; of a sharded tensor every process must ask at once, and is told the same."""
    # a sum that is finite says it at no cost of memory; one that is not can also have overflown
    if bool(torch.isfinite(whole(values.sum(dtype=torch.float32)))):
        return True
    return bool(torch.isfinite(whole(values)).all())
