"""Dynamic-k by share of the largest score: D2DMoE (arXiv 2310.04361), section 3.3."""

import torch
from torch import Tensor


def dynk_max(scores: Tensor, tau: Tensor | float) -> Tensor:
    """Run expert ``e`` iff ``r_e >= (1 - tau) * max r``; the paper's threshold is our ``1 - tau``.

    Args:
        scores: Predicted output norms, ``(N, E)``, non-negative.
        tau: In [0, 1]; 1 runs every expert, 0 only those that tie for the largest score.

    Returns:
        Boolean mask ``(N, E)``.
    """
    largest = scores.amax(dim=-1, keepdim=True)  # (N, 1)
    # "not below" rather than "at least": a NaN score then runs its expert and shows up in the output
    return torch.logical_not(scores < (1.0 - tau) * largest)


RULE = dynk_max
