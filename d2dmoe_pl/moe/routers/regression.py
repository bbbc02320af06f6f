"""A 2-layer MLP that predicts the norm of each expert's output: D2DMoE (arXiv 2310.04361), section 3.3."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.execution._eligibility import is_watched
from d2dmoe_pl.moe.experts.experts import Experts, own_tensors
from d2dmoe_pl.moe.routers import Router, RouterConfig
from d2dmoe_pl.moe.routers._router import RouterLinear

LINEAR = ("weight", "bias")


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
        scales = [layer._buffers["scale"] for layer in (up, down) if "scale" in layer._buffers]
        return [*_own(up), *_own(down), *scales]

    @property
    def is_quantized(self) -> bool | None:
        up, down = self._layers
        is_up = _is_quantized(up)
        return is_up if is_up == _is_quantized(down) else None

    @property
    def _layers(self) -> tuple[Any, Any]:
        return self._modules["up"], self._modules["down"]

    def flops(self) -> int:
        return 2 * (self.up.weight.numel() + self.down.weight.numel())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self(tokens).float(), target.float())  # squares overflow in float16


def _own(layer: Any) -> list[Tensor | None]:
    if "scale" in layer._buffers:  # in int8, where all are buffers
        return [layer._buffers[name] for name in LINEAR]
    return own_tensors(layer, LINEAR)


def _is_quantized(layer: Any) -> bool | None:
    """None for a layer of another kind, as an adapter's, or one that is watched, too: it is more than its weights."""
    if not isinstance(layer, nn.Module) or is_watched(layer):
        return None
    if type(layer) in (nn.Linear, RouterLinear):
        return False
    return True if "scale" in layer._buffers else None


ROUTER = RegressionRouter
