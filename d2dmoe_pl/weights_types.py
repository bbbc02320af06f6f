"""Which tensors of a model are of another floating type than most: what was put among them by hand is told by it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check


def floating_type(model: nn.Module) -> torch.dtype:
    """The type of what ``model`` is given, which is around int8 where it is in int8."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def types_beside_most(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The types of those tensors that are of another floating type than most of them, such as scales of int8.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.weights_types import types_beside_most
        >>> weights = {name: torch.zeros(2, dtype=torch.bfloat16) for name in ("a", "b", "c")}
        >>> types_beside_most({**weights, "scale": torch.ones(2), "ids": torch.arange(2)})
        {'scale': 'float32'}
    """
    types = _floating_types(tensors)
    most = _most(types)
    return {name: each for name, each in types.items() if each != most}


def check_types(
    read: Mapping[str, Tensor], wanted: Mapping[str, Tensor], written: Mapping[str, str] | None, folder: Path
) -> None:
    """Raise ``ConfigError`` unless the tensors that were read are of types with which their model can run.

    Args:
        read: From files in ``folder``, by name.
        wanted: The model's own, of which only those that are no floating ones say a type: a model is saved in any.
        written: What :func:`types_beside_most` gave when they were written; None where nobody has asked.
        folder: For the message.
    """
    for name in [name for name in read if name in wanted]:
        found, type_ = read[name], wanted[name].dtype
        check(
            found.dtype == type_ or (found.is_floating_point() and type_.is_floating_point),
            f"{folder}: {name} is of {_name_of(found)}; must be of {_name_of(wanted[name])}, as it was written",
        )
    if written is None:
        return
    types = _floating_types(read)
    most = _most({name: each for name, each in types.items() if name not in written})
    for name, each in types.items():
        allowed = dict.fromkeys((written.get(name, most), most))  # all may have been cast since
        check(
            each in allowed,
            f"{folder}: {name} is of {each} and most other weights are of {most}; must be of {' or '.join(allowed)}, "
            "as it was written",
        )


def _floating_types(tensors: Mapping[str, Any]) -> dict[str, str]:
    # what is no tensor is told elsewhere
    return {
        name: _name_of(tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }


def _most(types: Mapping[str, str]) -> str:
    return Counter(types.values()).most_common(1)[0][0] if types else _name_of(torch.empty(0))


def _name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
