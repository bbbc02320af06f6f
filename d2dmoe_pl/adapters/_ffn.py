"""The canonical view of one dense feed-forward network, whatever the architecture calls its parts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from d2dmoe_pl.hooks import Removable


@dataclass(frozen=True)
class TransposedLinear:
    """A projection that keeps its weight as ``(in, out)``, such as GPT-2's ``Conv1D``, seen as an ``nn.Linear``."""

    module: Any

    @property
    def weight(self) -> Tensor:
        """A view, ``(out, in)``."""
        return self.module.weight.t()

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias


@dataclass(frozen=True)
class LinearRows:
    """Some outputs of a linear module that computes more than one projection, seen as an ``nn.Linear``.

    Attributes:
        module: It.
        rows: Which of its outputs.
    """

    module: nn.Linear
    rows: slice

    @property
    def weight(self) -> Tensor:
        """A view, ``(out, in)``."""
        return self.module.weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """A view, ``(out,)``."""
        return None if self.module.bias is None else self.module.bias[self.rows]


AnyLinear = nn.Linear | TransposedLinear | LinearRows


def holder_of(linear: AnyLinear) -> Any:
    """The module that has the weights of ``linear``."""
    return linear.module if isinstance(linear, TransposedLinear | LinearRows) else linear


@dataclass(frozen=True)
class FFN:
    """One dense FFN of a model: ``y = down(act(up(x)))``, or gated: ``y = down(act(gate_proj(x)) * up(x))``.

    Attributes:
        name: Dotted path of the module that a MoE layer replaces; the FFN's name everywhere.
        up: Linear ``d_model -> d_ff``.
        activation: A module of its own, called once a forward pass with the pre-activation ``(..., d_ff)``, that of
            ``gate_proj`` in a gated FFN; where the model computes it outside of any module, while it is ``called``.
        down: Linear ``d_ff -> d_model``.
        gate_proj: Linear ``d_model -> d_ff`` of a gated FFN, whose activations its neurons' outputs are multiplied by.
        hidden_dropout: What the replaced module applies to the activation.
        output_dropout: What the replaced module applies to its output.
        residual_norm: Where the architecture has one, the LayerNorm after the residual: ``norm(x + dropout(y))``.
        is_projection: Whether it stands in the place of an attention's projection; its output may then be of another
            width than ``d_model``.
        called: Has the model call ``activation`` until what it gives is removed; nothing where the model does anyway.
    """

    name: str
    up: AnyLinear
    activation: nn.Module
    down: AnyLinear
    gate_proj: AnyLinear | None = None
    hidden_dropout: nn.Module = field(default_factory=nn.Identity)
    output_dropout: nn.Module = field(default_factory=nn.Identity)
    residual_norm: nn.LayerNorm | None = None
    is_projection: bool = False
    called: Callable[[], Iterable[Removable]] = tuple

    @property
    def d_model(self) -> int:
        return self.up.weight.shape[1]

    @property
    def d_ff(self) -> int:
        return self.up.weight.shape[0]

    @property
    def input_weight(self) -> Tensor:
        """What decides whether a neuron fires, ``(d_ff, d_model)``: rows of ``gate_proj``, or of ``up`` without one."""
        return (self.gate_proj or self.up).weight

    @property
    def is_sparse(self) -> bool:
        """Whether the activation gives exact zeros."""
        return isinstance(self.activation, nn.ReLU)

    @property
    def activation_name(self) -> str:
        return type(self.activation).__name__
