"""A 2-layer MLP that predicts the norm of each expert's output: D2DMoE (arXiv 2310.04361), section 3.3."""

from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.experts.experts import Experts, tensors_of
from d2dmoe_pl.moe.routers import Router, RouterConfig


class RegressionRouter(Router):
    """Linear, ReLU, Linear, absolute value; trained by mean squared error."""

    def __init__(self, experts: Experts, config: RouterConfig) -> None:
        super().__init__(experts, config)
        self.up = nn.Linear(experts.d_model, config.width)
        self.down = nn.Linear(config.width, experts.num_experts)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(tokens).relu()).abs()

    @property
    def weights(self) -> list[Tensor | None]:
        """All parameters, in the order that kernels take them; those in int8 have their scales after them."""
        up, down = (tensors_of(self._modules[name]) for name in ("up", "down"))
        weights = [up["weight"], up["bias"], down["weight"], down["bias"]]
        return [*weights, up["scale"], down["scale"]] if "scale" in up and "scale" in down else weights

    @property
    def is_quantized(self) -> bool | None:
        up, down = ("scale" in tensors_of(self._modules[name]) for name in ("up", "down"))
        return up if up == down else None

    def flops(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self(tokens), target)


ROUTER = RegressionRouter
