"""A 2-layer MLP that predicts the norm of each expert's output: D2DMoE (arXiv 2310.04361), section 3.3."""

from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.experts import Experts
from d2dmoe_pl.moe.router import Router, RouterConfig


class RegressionRouter(Router):
    """Linear, ReLU, Linear, absolute value; trained by mean squared error."""

    def __init__(self, d_model: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width)
        self.down = nn.Linear(width, num_experts)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(tokens).relu()).abs()

    def flops(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self(tokens), target)


def regression(experts: Experts, config: RouterConfig) -> RegressionRouter:
    """See :mod:`d2dmoe_pl.moe.routers`."""
    return RegressionRouter(experts.d_model, config.width, experts.num_experts)
