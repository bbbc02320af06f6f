"""A phase in a narrow type, but for what its model has in float32 in any."""

from typing import Any

import lightning as L
import torch
from torch import nn

from d2dmoe_pl.adapters import adapter_for


class KeepsExactBuffers(L.LightningModule):
    """Is cast, as trainers with ``precision=bf16-true`` cast it, all but its model's exact buffers.

    Attributes:
        model: Of the phase, once it is made.
    """

    model: nn.Module

    @property
    def is_made(self) -> bool:
        """Whether there is a model yet."""
        return isinstance(getattr(self, "model", None), nn.Module)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None or not self.is_made:
            return super().to(*args, **kwargs)
        with adapter_for(self.model).exact_buffers(self.model):
            return super().to(*args, **kwargs)
