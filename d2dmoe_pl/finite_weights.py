"""Weights that are no numbers never pass as good."""

from collections.abc import Iterable

import torch
from torch import Tensor

from d2dmoe_pl.errors import NonFiniteWeightsError
from d2dmoe_pl.sharded_tensors import is_finite


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None if there is none.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.finite_weights import first_non_finite
        >>> first_non_finite([("a", torch.zeros(2)), ("b", torch.tensor([1.0, float("nan")]))])
        'b'
    """
    for name, tensor in tensors:
        values = tensor.detach()
        if not (values.is_floating_point() or values.is_complex()) or values.is_meta:
            continue
        values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        if not is_finite(values):
            return name
    return None


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str, advice: str) -> None:
    """Raise unless all tensors are finite.

    Args:
        tensors: By name.
        what: They are, e.g. ``the weights after step 7``.
        advice: What follows, e.g. what is kept.

    Raises:
        NonFiniteWeightsError: Names the first that is not.
    """
    name = first_non_finite(tensors)
    if name is not None:
        raise NonFiniteWeightsError(f"{name}: {what} hold NaN or infinity; {advice}")
