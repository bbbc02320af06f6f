"""Split by weights: MoEfication (arXiv 2110.01786), section 3.1, as D2DMoE uses it."""

from torch import Tensor

from d2dmoe_pl.moe.clustering import balanced_kmeans


def parameter(weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means of the L2-normalised rows of ``weight``; see :mod:`d2dmoe_pl.moe.split`."""
    return balanced_kmeans(weight, num_experts, seed)


parameter.statistic = None
