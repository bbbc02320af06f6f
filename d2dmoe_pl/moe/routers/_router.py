"""What scores the experts of a MoE layer: a router, found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.routers._targets import Target
from d2dmoe_pl.plugins import Plugins
from d2dmoe_pl.typed_settings import check_types_

if TYPE_CHECKING:
    from d2dmoe_pl.moe.experts.experts import Experts


@dataclass(frozen=True)
class RouterConfig:
    """The router of a MoE layer.

    Attributes:
        width: Hidden neurons of ``regression``; the other kinds have no choice of theirs.
        kind: Name of a router, e.g. of a file in ``moe/routers``: ``regression`` (D2DMoE's), ``mlp``, ``similarity``,
            ``ground_truth`` or ``random`` (MoEfication's).
        target: What ``regression`` is trained to give of an expert: the ``norm`` of its output, as in the paper;
            ``relative_norm``, that over the mean of the token's; or ``activation_sum``, the sum of its activations over
            the batch's largest. The other kinds have no choice here either.

    Raises:
        ConfigError: If ``width`` is not positive, or for an unknown kind or target.

    Example:
        >>> from d2dmoe_pl import RouterConfig
        >>> RouterConfig(width=32)
        RouterConfig(width=32, kind='regression', target='norm')
    """

    width: int = 128
    kind: str = "regression"
    target: Target = "norm"

    def __post_init__(self) -> None:
        check_types_(self)
        check(self.width > 0, f"width={self.width}: a router needs at least one hidden neuron")
        ROUTERS.find(self.kind, "router")
        allowed = get_args(Target)
        check(self.target in allowed, f"target={self.target!r}: allowed are {', '.join(allowed)}")


class Router(nn.Module, ABC):
    """Tokens ``(N, d_model)`` to scores ``(N, E)``, not negative: experts with larger scores run first.

    Args:
        experts: Of the layer, to take sizes or weights from.
        config: What the router is made from.

    Attributes:
        is_gathered: As :class:`Experts` has it.
        reads_experts: Whether ``forward`` takes the layer's experts behind the tokens, as they are in that call:
            adapted, quantised or moved.
    """

    is_gathered = False
    reads_experts = False

    def __init__(self, experts: Experts, config: RouterConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def flops(self) -> int:
        """FLOPs for one token; a multiply-add is 2."""

    @property
    def is_quantized(self) -> bool | None:
        """Whether the weights are packed in a narrow type, as :class:`Experts` may be; None if some are."""
        return False

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return next(self.parameters(), None) is not None

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        """How far the scores are from ``target``, ``(N, E)``: a scalar. Routers with parameters define it."""
        raise TypeError(f"router {self.config.kind}: has nothing to train")


ROUTERS: Plugins[type[Router]] = Plugins(
    "d2dmoe_pl.moe.routers",
    "ROUTER",
    "a subclass of d2dmoe_pl.moe.routers.Router",
    lambda plugin: isinstance(plugin, type) and issubclass(plugin, Router),
)


def register_router(name: str, router: type[Router]) -> None:
    """Make ``router`` known as ``name``, wherever a router can be named; for this process.

    Args:
        name: What configs and artifacts call it.
        router: Its class.

    Raises:
        ConfigError: If the name is taken.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from d2dmoe_pl.moe.routers import Router, RouterConfig, register_router
        >>> class LinearRouter(Router):
        ...     def __init__(self, experts, config):
        ...         super().__init__(experts, config)
        ...         self.linear = nn.Linear(experts.d_model, experts.num_experts)
        ...     def forward(self, tokens):
        ...         return self.linear(tokens).abs()
        ...     def flops(self):
        ...         return 2 * self.linear.weight.numel()
        ...     def loss(self, tokens, target):
        ...         return nn.functional.mse_loss(self(tokens), target)
        >>> register_router("linear", LinearRouter)
        >>> RouterConfig(kind="linear")
        RouterConfig(width=128, kind='linear', target='norm')
    """
    ROUTERS.register(name, router)


class RouterLinear(nn.Module):
    """A linear layer of a router, which no tool takes for one of the model's, to be adapted or quantised.

    Args:
        linear: Whose weights it has.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def make_router(experts: Experts, config: RouterConfig) -> Router:
    """A new router for ``experts``, where they are and of their type."""
    router = ROUTERS.find(config.kind, "router")(experts, config)
    for name, module in list(router.named_modules()):
        if type(module) is nn.Linear:
            router.set_submodule(name, RouterLinear(module))
    return router.to(experts.up_weight.device, experts.up_weight.dtype)
