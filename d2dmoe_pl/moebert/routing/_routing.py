"""What every way to choose one expert a token has, and how one is found by name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from d2dmoe_pl.moe.token_context import TokenContext
from d2dmoe_pl.moebert.routing._decision import Decision
from d2dmoe_pl.plugins import Plugins


@dataclass(frozen=True)
class RoutingSizes:
    """What a routing is made for.

    Attributes:
        num_experts: ``E``.
        d_model: Width of the tokens.
        vocabulary_size: How many token ids there are; None for models of anything but text.
        seed: Of what is drawn at random.
    """

    num_experts: int
    d_model: int
    vocabulary_size: int | None
    seed: int


class Routing(nn.Module, ABC):
    """A choice of one expert for each token.

    Attributes:
        needs_ids: Whether it needs the model to be given token ids.
        needs_counts: Whether it needs to know how often each token id occurs in the training data.

    Args:
        sizes: What it is made for.
    """

    needs_ids: ClassVar[bool] = False
    needs_counts: ClassVar[bool] = False

    def __init__(self, sizes: RoutingSizes) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, tokens: Tensor, context: TokenContext) -> Decision:
        """The expert of each token.

        Args:
            tokens: ``(N, d_model)``, no padding among them.
            context: Of the running batch.
        """

    @abstractmethod
    def flops(self, tokens: int, sentences: int) -> int:
        """FLOPs of choosing for ``tokens`` in ``sentences``; a multiply-add is 2."""


ROUTINGS: Plugins[type[Routing]] = Plugins(
    "d2dmoe_pl.moebert.routing",
    "ROUTING",
    "a subclass of d2dmoe_pl.moebert.routing.Routing",
    lambda plugin: isinstance(plugin, type) and issubclass(plugin, Routing),
)


def register_routing(name: str, routing: type[Routing]) -> None:
    """Make ``routing`` known as ``name``, wherever a routing can be named; for this process.

    Args:
        name: What configs and artifacts call it.
        routing: Its class.

    Raises:
        ConfigError: If the name is taken.

    Example:
        >>> from d2dmoe_pl.moebert.routing import ROUTINGS, Decision, Routing, register_routing
        >>> class AlwaysTheFirst(Routing):
        ...     def forward(self, tokens, context):
        ...         return Decision(tokens.new_zeros(len(tokens), dtype=int))
        ...     def flops(self, tokens, sentences):
        ...         return 0
        >>> register_routing("always_the_first", AlwaysTheFirst)
        >>> ROUTINGS.names()
        ['always_the_first', 'gate_sentence', 'gate_token', 'hash_balance', 'hash_random']
    """
    ROUTINGS.register(name, routing)
