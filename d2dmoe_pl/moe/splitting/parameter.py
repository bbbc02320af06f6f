"""Split by weights: MoEfication (arXiv 2110.01786), section 3.1, as D2DMoE uses it."""

from torch import Tensor

from d2dmoe_pl.moe.splitting._balanced_kmeans import balanced_kmeans
from d2dmoe_pl.moe.splitting._split import Split


class ParameterSplit(Split):
    """Balanced k-means of the L2-normalised rows of the weights."""

    def __call__(self, weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
        return balanced_kmeans(weight, num_experts, seed)


SPLIT = ParameterSplit()
