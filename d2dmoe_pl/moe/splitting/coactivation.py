"""Split by co-activation graph: MoEfication (arXiv 2110.01786), section 3.1."""

from torch import Tensor

from d2dmoe_pl.moe.splitting._firing_statistics import CountedTokens, coactivation
from d2dmoe_pl.moe.splitting._graph_partition import balanced_partition
from d2dmoe_pl.moe.splitting._split import Split


class CoactivationSplit(Split):
    """Parts of the graph whose edges say how often and how strongly neurons fire together.

    Silent neurons have no edges, and go where there is room. The graph takes ``4 d_ff^2`` bytes an FFN, 38 MB for 3,072
    neurons.
    """

    needs_activations = True

    def statistic(self, activation: Tensor, tokens: CountedTokens) -> Tensor:
        return coactivation(activation, tokens)

    def __call__(self, weight: Tensor, statistic: Tensor | None, num_experts: int, seed: int) -> Tensor:
        assert statistic is not None
        return balanced_partition(statistic, num_experts, seed)


SPLIT = CoactivationSplit()
