"""A model called with other tensors than its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each place once: those of a module that has several names, under its first.

    Example:
        >>> from torch import nn
        >>> from d2dmoe_pl.borrowed_tensors import own_tensors
        >>> linear = nn.Linear(2, 3)
        >>> list(own_tensors(nn.ModuleDict({"a": linear, "b": linear})))
        ['a.weight', 'a.bias']
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        prefix, alone = f"{name}." if name else "", {"recurse": False, "remove_duplicate": False}
        parts = (module.named_parameters(**alone), module.named_buffers(**alone))
        found |= {f"{prefix}{key}": tensor for part in parts for key, tensor in part}
    return found


class Borrowing:
    """``model``, whose calls compute with ``tensors`` in the places that :func:`own_tensors` names.

    A place that was borrowed twice, under two names, would be given back the first loan.

    Args:
        model: Left as it is.
        tensors: By name.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        self.tensors = tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return functional_call(self.model, dict(self.tensors), args, kwargs, tie_weights=False)
