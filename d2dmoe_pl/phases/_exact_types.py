"""A phase in a narrow type, but for what would be wrong in it: some buffers, sums of metrics, labels."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import nn
from torchmetrics import Metric

from d2dmoe_pl.adapters import adapter_for


class InputsAlone:
    """Gives batches the type of a trainer's precision, all but their labels, which are compared and not computed with.

    Args:
        convert: Converts all numbers that are not whole.
    """

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert

    def __call__(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            return self.convert(batch)
        return {**self.convert({key: batch[key] for key in batch if key != "labels"}), "labels": batch["labels"]}


class ExactTypes(L.LightningModule):
    """Is cast and fed, as trainers with ``precision=bf16-true`` do it, but for what has to stay exact.

    That are the exact buffers of its model, the states of metrics, and labels.

    Attributes:
        model: Of the phase, once it is made.
    """

    model: nn.Module

    @property
    def is_made(self) -> bool:
        """Whether there is a model yet."""
        return isinstance(getattr(self, "model", None), nn.Module)

    def setup(self, stage: str) -> None:
        plugin: Any = self.trainer.precision_plugin
        if not isinstance(plugin.convert_input, InputsAlone):
            plugin.convert_input = InputsAlone(plugin.convert_input)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None or not self.is_made:
            return super().to(*args, **kwargs)
        with adapter_for(self.model).exact_buffers(self.model), _metrics_apart(self, device):
            return super().to(*args, **kwargs)


@contextmanager
def _metrics_apart(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Let a module be cast in the body without its metrics, which only move to the device that there is."""
    parents = list(module.modules())
    children = [(parent, name, child) for parent in parents for name, child in parent._modules.items()]
    metrics = [(parent, name, child) for parent, name, child in children if isinstance(child, Metric)]
    for parent, name, _ in metrics:
        parent._modules[name] = None
    try:
        yield
    finally:
        for parent, name, metric in metrics:
            parent._modules[name] = metric.to(device)
