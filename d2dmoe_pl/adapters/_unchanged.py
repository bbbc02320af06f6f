"""Calling a model without changing how it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SILENT = 1e-3  # the largest of parameters that are next to nothing


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


@contextmanager
def nothing_silent(model: nn.Module) -> Iterator[None]:
    """Give noise in the body to parameters of ``model`` that are next to nothing, by which parts of it show nothing.

    Residual branches often begin so, and a proof of what they compute would be one of nothing.
    """
    silent = [
        (parameter, parameter.detach().clone())
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.numel() > 0 and float(parameter.detach().abs().max()) < SILENT
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # what is drawn is none of a training's
            for parameter, _ in silent:
                parameter.copy_(0.1 * torch.randn(parameter.shape, device="cpu"))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in silent:
                parameter.copy_(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
