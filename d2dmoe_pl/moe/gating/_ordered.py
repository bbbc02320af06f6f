"""Scores from the largest to the smallest."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

Order = tuple[Tensor, Tensor]


def ordered(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``(N, E)`` from the largest on, and their experts, ``(N, E)``; equal ones in the order of the experts.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.gating._ordered import ordered
        >>> ordered(torch.tensor([[1.0, 3.0, 3.0]]))
        (tensor([[3., 3., 1.]]), tensor([[1, 2, 0]]))
    """
    if torch.onnx.is_in_onnx_export():  # where there is no stable sort, but TopK, which puts equal ones in that order
        values, experts = scores.topk(scores.shape[-1], dim=-1)
    else:
        values, experts = scores.sort(dim=-1, descending=True, stable=True)
    return values, experts


def order_for(rule: Callable[..., Tensor], scores: Tensor) -> dict[str, Order]:
    """What a rule takes beside scores and ``tau``, so as not to sort these scores anew for every ``tau``.

    Args:
        rule: A gating rule; one that sorts has a further argument, ``ordered_scores: Order | None = None``.
        scores: ``(N, E)``.

    Returns:
        For rules that do not sort, nothing.
    """
    return {"ordered_scores": ordered(scores)} if "ordered_scores" in inspect.signature(rule).parameters else {}
