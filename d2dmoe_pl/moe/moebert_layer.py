"""The layer that stands where a dense FFN, its residual and its LayerNorm stood: MoEBERT (arXiv 2204.07675)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl import plugins
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe import routing as routings
from d2dmoe_pl.moe.chosen import Chosen
from d2dmoe_pl.moe.context import TokenContext, real_tokens
from d2dmoe_pl.moe.importance_experts import ImportanceExperts


@dataclass(frozen=True)
class MoEBERTConfig:
    """Experts made of important neurons, and the choice among them.

    Attributes:
        num_experts: ``E``.
        expert_dim: Neurons of an expert.
        num_shared: How many of them every expert has.
        routing: Name of a file in ``moe/routing``.
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
        check(self.num_experts > 0, f"num_experts={self.num_experts}: must be positive")
        check(self.expert_dim > 0, f"expert_dim={self.expert_dim}: must be positive")
        check(
            0 <= self.num_shared <= self.expert_dim,
            f"num_shared={self.num_shared}: must lie in [0, expert_dim], which is {self.expert_dim}, the neurons that "
            "an expert holds",
        )
        check(0.0 <= self.expert_dropout < 1.0, f"expert_dropout={self.expert_dropout}: must lie in [0, 1)")
        plugins.find(routings, self.routing, "routing")


class MoEBERTLayer(nn.Module):
    """Experts, and a routing that sends each token to one of them.

    Args:
        experts: The experts.
        routing: A module of :mod:`d2dmoe_pl.moe.routing`.
        context: Of the model.
        config: What the layer was made from.
    """

    def __init__(
        self, experts: ImportanceExperts, routing: nn.Module, context: TokenContext, config: MoEBERTConfig
    ) -> None:
        super().__init__()
        self.experts = experts
        self.routing = routing
        self.context = context
        self.config = config
        self._needs_ids = plugins.find(routings, config.routing, "routing").needs_ids

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to the same shape; rows of padding come out as zeros.

        Raises:
            ValueError: If the routing goes by token ids and the model was called without ``input_ids``.
        """
        if self._needs_ids and self.context.token_ids is None:
            raise ValueError(f"input_ids=None: the routing {self.config.routing} needs token ids")
        positions = x.reshape(-1, x.shape[-1])  # (B * L, d)
        index = self.context.token_index
        tokens = real_tokens(positions, index)  # (N, d)
        chosen: Chosen = self.routing(tokens, self.context)
        output = self.experts(tokens, chosen.expert, chosen.scale)  # (N, d)
        if index is not None:
            output = output.new_zeros(positions.shape).index_copy(0, index, output)
        return output.view(x.shape)

    def watch(self, observer: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``observer`` with the boolean mask ``(N, E)`` of every routing decision, until the handle is removed."""

        def hook(routing: nn.Module, args: tuple, chosen: Chosen) -> None:
            observer(F.one_hot(chosen.expert, self.experts.num_experts).bool())

        return self.routing.register_forward_hook(hook)
