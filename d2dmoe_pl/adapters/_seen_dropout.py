"""Dropout that a call of a model would apply if it were trained, whether by a module or by a function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PLAIN = "dropout"
KINDS = {
    **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_), PLAIN),
    **{getattr(F, name): name for name in ("dropout1d", "dropout2d", "dropout3d")},
    **{getattr(F, name): name for name in ("alpha_dropout", "feature_alpha_dropout")},
}


class SeesDropout(TorchFunctionMode):
    """Tells of each function for dropout that is called in the body, also where it drops nothing now.

    Args:
        told: Gets the tensor, what the function is called, and its rate.
    """

    def __init__(self, told: Callable[[Tensor, str, float], None]) -> None:
        super().__init__()
        self.told = told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KINDS:
            first = {**dict(zip(("input", "p"), args, strict=False)), **kwargs}
            self.told(first["input"], KINDS[func], first.get("p", 0.5))
        return func(*args, **kwargs)
