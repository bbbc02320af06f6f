"""Split by co-activation graph: MoEfication (arXiv 2110.01786), section 3.1."""

from torch import Tensor

from d2dmoe_pl.moe import firing
from d2dmoe_pl.moe.graph_partition import balanced_partition


def coactivation(weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
    """Parts of the graph whose edges say how often and how strongly neurons fire together; see the package.

    Silent neurons have no edges, and go where there is room. The graph takes ``4 d_ff^2`` bytes an FFN, 38 MB for 3,072
    neurons.
    """
    return balanced_partition(statistic, num_experts, seed)


coactivation.statistic = firing.coactivation
