"""A fixed number of experts for every token: MoEfication (arXiv 2110.01786), section 3.2."""

import torch
from torch import Tensor

from d2dmoe_pl.moe.gating._ordered import Order, ordered


def topk(scores: Tensor, tau: Tensor | float, k: int | None = None, ordered_scores: Order | None = None) -> Tensor:
    """Run the ``k`` experts with the largest scores.

    Args:
        scores: Predicted scores, ``(N, E)``.
        tau: In [0, 1]; the share of experts to run where ``k`` is not given: ``k = max(1, ceil(tau * E))``.
        k: How many experts to run, at most ``E``.
        ordered_scores: The scores in order, where that is known.

    Returns:
        Boolean mask ``(N, E)`` with exactly ``k`` true entries a row.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.gating.topk import topk
        >>> topk(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), tau=1.0, k=2)
        tensor([[ True, False,  True, False]])
    """
    if k is None:
        # the small step back keeps tau = 3/10 of 10 experts at 3, whatever binary fractions say; in float64, so
        # that it is not lost
        share = torch.as_tensor(tau, dtype=torch.float64) * scores.shape[-1] - 1e-9
        ordered_mask = torch.arange(scores.shape[-1], device=scores.device) < share.ceil().clamp(min=1)  # (E,)
        _, experts = ordered(scores) if ordered_scores is None else ordered_scores  # (N, E)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, ordered_mask.expand_as(experts))
    best = scores.topk(k, dim=-1).indices  # (N, k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, 1)  # no True: traces know no scatter of it


RULE = topk
