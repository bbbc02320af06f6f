"""Masked dense execution: runs everything, zeroes what the mask leaves out. Exact, differentiable, saves no time."""

from torch import Tensor


def reference(experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.kernels`; gradients reach executed experts only."""
    return experts.combine(experts.hidden(tokens) * mask.unsqueeze(-1))  # (N, E, s) -> (N, d_out)
