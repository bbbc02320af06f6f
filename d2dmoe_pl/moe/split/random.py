"""Random split: the baseline that every other split must beat."""

import torch
from torch import Tensor


def random(weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
    """A seeded random balanced assignment; see :mod:`d2dmoe_pl.moe.split`."""
    d_ff = weight.shape[0]
    order = torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))
    return order * num_experts // d_ff  # each value d_ff / E times


random.statistic = None
