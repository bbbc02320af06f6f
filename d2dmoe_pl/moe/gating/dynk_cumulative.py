"""Dynamic-k by cumulative share of the scores, as in the d2dmoe package's ``dynk`` rule."""

import torch
from torch import Tensor

from d2dmoe_pl.moe.gating._ordered import Order, ordered


def dynk_cumulative(scores: Tensor, tau: Tensor | float, ordered_scores: Order | None = None) -> Tensor:
    """Run the fewest experts whose share of ``sum r`` reaches ``tau``, at least one.

    Args:
        scores: Predicted output norms, ``(N, E)``, non-negative.
        tau: In [0, 1]; 1 runs every expert (also those whose score is exactly zero).
        ordered_scores: The scores in order, where that is known.

    Returns:
        Boolean mask ``(N, E)``.
    """
    values, experts = ordered(scores) if ordered_scores is None else ordered_scores  # (N, E)
    reached_before = values.cumsum(dim=-1) - values  # (N, E): sum of the larger scores
    ordered_mask = torch.logical_not(reached_before >= tau * values.sum(dim=-1, keepdim=True))
    ordered_mask[:, 0] = True
    return torch.zeros_like(ordered_mask).scatter(-1, experts, ordered_mask | (tau >= 1.0))


RULE = dynk_cumulative
