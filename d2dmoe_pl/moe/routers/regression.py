"""A 2-layer MLP that predicts the norm of each expert's output: D2DMoE (arXiv 2310.04361), section 3.3."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.routers import Router, RouterConfig
from d2dmoe_pl.moe.routers._router import RouterLinear


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
        up: Any = self.up
        down: Any = self.down
        weights = [up.weight, up.bias, down.weight, down.bias]
        return [*weights, up.scale, down.scale] if self.is_quantized else weights

    @property
    def is_quantized(self) -> bool | None:
        # None for a layer of another kind too, as an adapter's, or one that is watched: it is more than its weights
        layers: list[Any] = [self._modules["up"], self._modules["down"]]
        kinds = {"scale" in layer._buffers if _is_plain(layer) else None for layer in layers}
        return kinds.pop() if len(kinds) == 1 else None

    def flops(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self(tokens), target)


def _is_plain(layer: Any) -> bool:
    is_kind = type(layer) in (nn.Linear, RouterLinear) or (isinstance(layer, nn.Module) and "scale" in layer._buffers)
    return is_kind and not layer._forward_hooks and not layer._forward_pre_hooks


ROUTER = RegressionRouter
