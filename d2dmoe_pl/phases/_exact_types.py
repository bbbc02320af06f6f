"""A phase in a narrow type, but for what would be wrong in it: some buffers, sums of metrics, labels."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torchmetrics import Metric

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.weights_types import floating_type


class InputsAlone:
    """Gives batches the type of a trainer's precision, all but their labels, which are compared and not computed with.

    Args:
        convert: Converts all numbers that are not whole.
        own_type: Gives the type of the model, where that is what the trainer computes in.
    """

    def __init__(self, convert: Callable[[Any], Any], own_type: Callable[[], torch.dtype] | None = None) -> None:
        self.convert = convert
        self.own_type = own_type

    def __call__(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return self.convert(batch)
        converted = self.convert({key: batch[key] for key in batch if key != "labels"})
        if self.own_type is not None:
            dtype = self.own_type()
            converted = {key: value.to(dtype) if _is_fraction(value) else value for key, value in converted.items()}
        return {**converted, **{key: batch[key] for key in batch if key == "labels"}}


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
            # trainers with 32-true leave weights as they are, which may have been loaded in a narrower type
            is_plain = type(plugin) is Precision
            plugin.convert_input = InputsAlone(
                plugin.convert_input, (lambda: floating_type(self.model)) if is_plain else None
            )

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None or not self.is_made:
            return super().to(*args, **kwargs)
        with adapter_for(self.model).exact_buffers(self.model), _metrics_apart(self, device):
            return super().to(*args, **kwargs)


def _is_fraction(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
