"""A 2-layer MLP that tells which experts fire: MoEfication (arXiv 2110.01786), section 3.2."""

from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.routers import Router, RouterConfig


class MLPRouter(Router):
    """``d -> E -> E``, tanh inside; trained by cross-entropy on targets in [0, 1], which the scores then lie in too."""

    def __init__(self, experts: Experts, config: RouterConfig) -> None:
        super().__init__(experts, config)
        self.up = nn.Linear(experts.d_model, experts.num_experts)
        self.down = nn.Linear(experts.num_experts, experts.num_experts)

    def logits(self, tokens: Tensor) -> Tensor:
        """``(N, d_model)`` to ``(N, E)``."""
        return self.down(self.up(tokens).tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens).sigmoid()

    def flops(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logits(tokens), target)


ROUTER = MLPRouter
