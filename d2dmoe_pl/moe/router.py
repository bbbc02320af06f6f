"""Routers predict the norm of each expert's output: D2DMoE (arXiv 2310.04361), section 3.3."""

from dataclasses import dataclass

from torch import Tensor, nn

from d2dmoe_pl.errors import check


@dataclass(frozen=True)
class RouterConfig:
    """A 2-layer MLP a MoE layer.

    Attributes:
        width: Hidden neurons of the router; its cost is ``2 * width * (d_model + E)`` FLOPs a token.

    Raises:
        ConfigError: If ``width`` is not positive.
    """

    width: int = 128

    def __post_init__(self) -> None:
        check(self.width > 0, f"width={self.width}: a router needs at least one hidden neuron")


class Router(nn.Module):
    """Tokens ``(N, d_model)`` to non-negative scores ``(N, E)``: Linear, ReLU, Linear, absolute value."""

    def __init__(self, d_model: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Linear(d_model, config.width)
        self.down = nn.Linear(config.width, num_experts)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(tokens).relu()).abs()
