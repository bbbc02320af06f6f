"""A 2-layer MLP that predicts the norm of each expert's output: D2DMoE (arXiv 2310.04361), section 3.3."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.execution._eligibility import is_watched
from d2dmoe_pl.moe.experts.experts import Experts, own_tensors
from d2dmoe_pl.moe.routers import Router, RouterConfig
from d2dmoe_pl.moe.routers._router import RouterLinear

LINEAR = ("weight", "bias")
PLAIN = (nn.Linear, RouterLinear)  # not an adapter's, which is more than its weights


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
        up, down = self._layers
        first, second = up._buffers, down._buffers
        if "scale" in first and "scale" in second:  # in int8, where all are buffers
            numbers = [first["weight"], first["bias"], second["weight"], second["bias"]]
            return [*numbers, first["scale"], second["scale"]]
        return own_tensors(up, LINEAR) + own_tensors(down, LINEAR)

    @property
    def is_quantized(self) -> bool | None:
        up, down = self._layers
        if is_watched(up, down):  # each is then more than its weights
            return None
        if type(up) in PLAIN and type(down) in PLAIN:
            return False
        return True if "scale" in up._buffers and "scale" in down._buffers else None

    @property
    def _layers(self) -> tuple[Any, Any]:
        return self._modules["up"], self._modules["down"]

    def flops(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self(tokens).float(), target.float())  # squares overflow in float16


ROUTER = RegressionRouter
