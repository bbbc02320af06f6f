"""Penalties that make activations sparse, and how their weight grows: D2DMoE (arXiv 2310.04361), section 3.1."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["l1", "hoyer"]
Schedule = Literal["constant", "linear", "warmup"]


def l1(activation: Tensor) -> Tensor:
    """``sum_j |a_j|`` of each token: ``(..., d_ff)`` to ``(...)``, float32 at least."""
    return activation.abs().sum(dim=-1, dtype=at_least_float32(activation))


def hoyer(activation: Tensor, eps: float = 1e-8) -> Tensor:
    """Square Hoyer, ``(sum_j |a_j|)^2 / (sum_j a_j^2 + eps)`` of each token: between 0 and the neurons that fire.

    In float32 at least, since in float16 squares overflow and ``eps`` is zero.
    """
    # no copy in float32 is kept
    length = torch.linalg.vector_norm(activation, dim=-1, dtype=at_least_float32(activation))
    return l1(activation).square() / (length.square() + eps)


def at_least_float32(values: Tensor) -> torch.dtype:
    """The type of ``values``, or float32 where that is wider."""
    return torch.promote_types(values.dtype, torch.float32)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "hoyer": hoyer}


def clamped(pre_activation: Tensor, displacement: float) -> Tensor:
    """``max(z - c, 0)``: what the penalties act on for GELU and SiLU, which give no exact zeros."""
    return (pre_activation - displacement).clamp(min=0)


def alpha_at(alpha: float, schedule: Schedule, progress: float) -> float:
    """The weight of the penalty after a share of the training.

    Args:
        alpha: The weight reached.
        schedule: ``constant``; ``linear`` from 0 to the end; ``warmup``, linear from 0 to half-way, then constant.
        progress: Share of the training that is done, in [0, 1].
    """
    if schedule == "constant":
        return alpha
    return alpha * min(1.0, progress if schedule == "linear" else 2 * progress)
