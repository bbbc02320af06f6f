"""The layer that stands where a dense FFN, its residual and its LayerNorm stood: MoEBERT (arXiv 2204.07675)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.errors import ConfigError, check, said_of
from d2dmoe_pl.moe.expert_layer import ExpertLayer, ExpertSizes
from d2dmoe_pl.moe.token_context import TokenContext, run_on_real_tokens
from d2dmoe_pl.moebert.experts import ImportanceExperts
from d2dmoe_pl.moebert.routing import ROUTINGS, Decision, Routing
from d2dmoe_pl.typed_settings import check_types_

METHOD = "moebert"  # in artifacts


@dataclass(frozen=True)
class MoEBERTConfig:
    """Experts made of important neurons, and the choice among them.

    Attributes:
        num_experts: ``E``.
        expert_dim: Neurons of an expert.
        num_shared: How many of them every expert has.
        routing: Name of a routing, e.g. of a file in ``moebert/routing``.
        expert_dropout: On each expert's output.
        seed: Of random hash tables.

    Raises:
        ConfigError: For numbers out of range, more shared neurons than an expert holds, or an unknown routing.
    """

    num_experts: int = 4
    expert_dim: int = 768
    num_shared: int = 512
    routing: str = "hash_random"
    expert_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_types_(self)
        check(self.num_experts > 0, f"num_experts={self.num_experts}: must be positive")
        check(self.expert_dim > 0, f"expert_dim={self.expert_dim}: must be positive")
        check(
            0 <= self.num_shared <= self.expert_dim,
            f"num_shared={self.num_shared}: must lie in [0, expert_dim], which is {self.expert_dim}, the neurons that "
            "an expert holds",
        )
        check(0.0 <= self.expert_dropout < 1.0, f"expert_dropout={self.expert_dropout}: must lie in [0, 1)")
        ROUTINGS.find(self.routing, "routing")


class MoEBERTLayer(ExpertLayer):
    """Experts, and a routing that sends each token to one of them.

    Args:
        experts: The experts.
        routing: Chooses one of them for each token.
        context: Of the model.
        config: What the layer was made from.
    """

    experts: ImportanceExperts
    routing: Routing

    def __init__(
        self, experts: ImportanceExperts, routing: Routing, context: TokenContext, config: MoEBERTConfig
    ) -> None:
        super().__init__()
        self.experts = experts
        self.routing = routing
        self.context = context
        self.config = config

    @property
    def sizes(self) -> ExpertSizes:
        return self.experts

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to the same shape; rows of padding come out as zeros.

        Raises:
            ValueError: If the routing goes by token ids and the model was called without ``input_ids``.
        """
        if self.routing.needs_ids and self.context.token_ids is None:
            raise ValueError(
                f"input_ids=None: the routing {self.config.routing} needs token ids; must be given to the model that "
                "was converted, of which a part alone has none"
            )
        return run_on_real_tokens(self._run, x, self.context.token_index)

    def watch(self, observer: Callable[[Tensor], object]) -> RemovableHandle:
        def hook(routing: nn.Module, args: tuple, decision: Decision) -> None:
            observer(F.one_hot(decision.expert, self.experts.num_experts).bool())

        return self.routing.register_forward_hook(hook)

    def flops_beside_experts(self, tokens: int, samples: int) -> int:
        return self.routing.flops(tokens, samples)

    def describe(self) -> dict[str, Any]:
        return {"method": METHOD, **asdict(self.config)}

    def _run(self, tokens: Tensor) -> Tensor:
        """Tokens without padding, ``(N, d_model)`` to the same shape."""
        decision: Decision = self.routing(tokens, self.context)
        self._check(decision, tokens.shape[0])  # len() would fix the number where it is exported
        return self.experts(tokens, decision.expert, decision.scale)

    def _check(self, decision: Any, count: int) -> None:
        """Raise ``ConfigError`` unless a routing, which may be anybody's, has decided for every token."""
        expert: Any = getattr(decision, "expert", None)
        scale: Any = getattr(decision, "scale", None)
        is_integer = isinstance(expert, Tensor) and not (expert.is_floating_point() or expert.dtype == torch.bool)
        if not (is_integer and expert.shape == (count,)):
            raise ConfigError(
                f"routing={self.config.routing!r}: gave {said_of(expert)}; must be a Decision whose expert is "
                f"({count},) integers, one for each token"
            )
        if scale is not None and not (isinstance(scale, Tensor) and scale.shape == (count, 1)):
            raise ConfigError(
                f"routing={self.config.routing!r}: gave the scale {said_of(scale)}; must be ({count}, 1), or None"
            )


def moebert_layers(model: nn.Module) -> dict[str, MoEBERTLayer]:
    """The MoEBERT layers of ``model`` by name, first to last."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEBERTLayer)}
