"""Masked dense execution: runs everything, zeroes what the mask leaves out. Exact, differentiable, saves no time."""

from torch import Tensor

from d2dmoe_pl.moe.cutoffs.cutoffs import cut
from d2dmoe_pl.moe.experts.experts import Experts


def reference(
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; gradients reach executed experts only."""
    hidden = experts.hidden(tokens, gate_cutoff)  # (N, E, s)
    kept = hidden if cutoff is None else cut(hidden, cutoff)
    return experts.combine(kept * mask.unsqueeze(-1))


BACKEND = reference
