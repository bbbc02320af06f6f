"""What scores the experts of a MoE layer: a router, found by name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from d2dmoe_pl import plugins
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe import routers
from d2dmoe_pl.moe.experts import Experts


@dataclass(frozen=True)
class RouterConfig:
    """The router of a MoE layer.

    Attributes:
        width: Hidden neurons of ``regression``; the other kinds have no choice of theirs.
        kind: Name of a file in ``moe/routers``: ``regression`` (D2DMoE's), ``mlp``, ``similarity``, ``ground_truth`` or
            ``random`` (MoEfication's).

    Raises:
        ConfigError: If ``width`` is not positive, or for an unknown kind.
    """

    width: int = 128
    kind: str = "regression"

    def __post_init__(self) -> None:
        check(self.width > 0, f"width={self.width}: a router needs at least one hidden neuron")
        plugins.find(routers, self.kind, "router")


class Router(nn.Module, ABC):
    """Tokens ``(N, d_model)`` to scores ``(N, E)``, not negative: experts with larger scores run first."""

    config: RouterConfig

    @abstractmethod
    def flops(self) -> int:
        """FLOPs for one token; a multiply-add is 2."""

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return next(self.parameters(), None) is not None

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        """How far the scores are from ``target``, ``(N, E)``: a scalar. Routers with parameters define it."""
        raise TypeError(f"router {self.config.kind}: has nothing to train")


def make_router(experts: Experts, config: RouterConfig) -> Router:
    """A new router for ``experts``, where they are and of their type."""
    router = plugins.find(routers, config.kind, "router")(experts, config)
    router.config = config
    return router.to(experts.up_weight.device, experts.up_weight.dtype)
