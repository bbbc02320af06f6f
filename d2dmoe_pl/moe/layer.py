"""The layer that stands where a dense FFN stood."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.moe.context import TokenContext, real_tokens
from d2dmoe_pl.moe.experts import Experts
from d2dmoe_pl.moe.gate import Gate
from d2dmoe_pl.moe.router import Router


class MoELayer(nn.Module):
    """Experts, and once there are a router and a gate, a per-token choice among them.

    Without a router or a gate every expert runs and the layer is the dense FFN it was made from.

    Attributes:
        observer: Called with ``(tokens (N, d_model), hidden (N, E, s))``, the activations of all experts, whichever of
            them the gate admits. How routers get inputs and targets from the pass that the model makes anyway.
    """

    def __init__(self, experts: Experts, context: TokenContext, output_dropout: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.router: Router | None = None
        self.gate: Gate | None = None
        self.output_dropout = output_dropout
        self.context = context
        self.observer: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to ``(..., d_out)``, mostly the same; rows of padding come out as zeros."""
        positions = x.reshape(-1, x.shape[-1])  # (B * L, d)
        index = self.context.token_index
        tokens = real_tokens(positions, index)  # (N, d)
        output = self._run(tokens)  # (N, d_out)
        if index is not None:
            output = output.new_zeros(len(positions), output.shape[1]).index_copy(0, index, output)
        return self.output_dropout(output.view(*x.shape[:-1], -1))

    def watch(self, observer: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``observer`` with the boolean mask ``(N, E)`` of every routing decision, until the handle is removed."""
        return self.gate.register_forward_hook(lambda gate, args, mask: observer(mask))

    def _run(self, tokens: Tensor) -> Tensor:
        is_routed = self.router is not None and self.gate is not None
        mask = self.gate(self.router(tokens)) if is_routed else None  # (N, E)
        if self.observer is None:
            return self.experts(tokens, mask)
        hidden = self.experts.hidden(tokens)  # (N, E, s)
        self.observer(tokens, hidden)
        return self.experts.combine(hidden if mask is None else hidden * mask.unsqueeze(-1))


@contextmanager
def observed(layers: Mapping[str, MoELayer], observer: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``observer(name, tokens, hidden)`` for every layer that runs in the body; see :class:`MoELayer`."""
    for name, layer in layers.items():
        layer.observer = partial(observer, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.observer = None
