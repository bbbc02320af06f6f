"""A fixed number of experts for every token: MoEfication (arXiv 2110.01786), section 3.2."""

import math

import torch
from torch import Tensor


def topk(scores: Tensor, tau: float) -> Tensor:
    """Run the ``k = max(1, ceil(tau * E))`` experts with the largest scores.

    Args:
        scores: Predicted scores, ``(N, E)``.
        tau: In [0, 1]; the share of experts to run.

    Returns:
        Boolean mask ``(N, E)`` with exactly ``k`` true entries a row.
    """
    num_experts = scores.shape[-1]
    # the small step back keeps tau = 3/10 of 10 experts at 3, whatever binary fractions say
    k = max(1, math.ceil(tau * num_experts - 1e-9))
    best = scores.topk(k, dim=-1).indices  # (N, k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
