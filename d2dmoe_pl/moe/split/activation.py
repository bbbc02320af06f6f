"""Split by activation profile: neurons that fire for the same tokens go to the same expert. Not in the papers."""

from torch import Tensor

from d2dmoe_pl.moe import firing
from d2dmoe_pl.moe.clustering import balanced_kmeans


def activation(weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means of the L2-normalised rows of ``statistic``; see :mod:`d2dmoe_pl.moe.split`."""
    return balanced_kmeans(statistic, num_experts, seed)


activation.statistic = firing.profile
