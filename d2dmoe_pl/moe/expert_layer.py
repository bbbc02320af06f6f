"""What every layer with experts is, of whatever method."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.moe.token_context import TokenContext


class ExpertSizes(Protocol):
    """The sizes of experts, whatever they are made of.

    Attributes:
        num_experts: ``E``.
        expert_dim: ``s``, the neurons of one expert.
        dense_dim: Neurons of the dense FFN that they were made from.
        d_model: Width of what they take.
        d_out: Width of what they give.
        is_gated: Whether a neuron has a weight vector in ``gate_proj`` as well.
    """

    num_experts: int

    @property
    def is_gated(self) -> bool: ...

    @property
    def expert_dim(self) -> int: ...

    @property
    def dense_dim(self) -> int: ...

    @property
    def d_model(self) -> int: ...

    @property
    def d_out(self) -> int: ...


class ExpertLayer(nn.Module, ABC):
    """What stands where a dense FFN stood and has experts, of whatever method.

    Attributes:
        experts: The experts.
        context: Of the model.
    """

    context: TokenContext

    @property
    @abstractmethod
    def sizes(self) -> ExpertSizes:
        """The sizes of the experts."""

    @abstractmethod
    def watch(self, observer: Callable[[Tensor], object]) -> RemovableHandle:
        """Call ``observer`` with the boolean mask ``(N, E)`` of every decision, until the handle is removed."""

    def watch_work(self, observer: Callable[[Tensor], object]) -> RemovableHandle:
        """Call ``observer`` with what each token has experts do, ``(N,)``, until the handle is removed.

        It is counted in executed pairs. One of which small values are left out counts as what is left of its FLOPs.
        """
        return self.watch(lambda mask: observer(mask.sum(dim=1)))

    @abstractmethod
    def flops_beside_experts(self, tokens: int, samples: int) -> int:
        """FLOPs of choosing experts, and of standing in for the others, for ``tokens`` of ``samples``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What an artifact says of this layer, as plain JSON; what restores it can be made from that alone."""
