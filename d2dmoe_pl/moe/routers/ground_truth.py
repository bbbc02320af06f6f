"""The experts that fire most, known by looking: the oracle of MoEfication (arXiv 2110.01786), section 3.2.

It computes every activation before it chooses, so it saves little, and its cost is counted in full. It is there to say
how good a choice of experts could be.
"""

from torch import Tensor

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.routers import Router, RouterConfig, positive_sums


class GroundTruthRouter(Router):
    """The sum of each expert's positive activations."""

    reads_experts = True

    def __init__(self, experts: Experts, config: RouterConfig) -> None:
        super().__init__(experts, config)
        products = 2 if experts.is_gated else 1
        self._flops = 2 * products * experts.d_model * experts.dense_dim

    def forward(self, tokens: Tensor, experts: Experts) -> Tensor:
        return positive_sums(experts.hidden(tokens))

    def flops(self) -> int:
        return self._flops


ROUTER = GroundTruthRouter
