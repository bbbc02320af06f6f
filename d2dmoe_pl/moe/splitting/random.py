"""Random split: the baseline that every other split must beat."""

import torch
from torch import Tensor

from d2dmoe_pl.moe.splitting._split import Split


class RandomSplit(Split):
    """A seeded random balanced assignment."""

    def __call__(self, weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
        d_ff = weight.shape[0]
        order = torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))
        return order * num_experts // d_ff  # each value d_ff / E times


SPLIT = RandomSplit()
