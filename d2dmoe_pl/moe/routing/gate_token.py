"""A linear gate on each token."""

from torch import Tensor, nn

from d2dmoe_pl.moe.chosen import Chosen, RoutingSizes, choose
from d2dmoe_pl.moe.context import TokenContext


class TokenGate(nn.Module):
    """The expert with the largest probability, its output scaled by it."""

    def __init__(self, sizes: RoutingSizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.d_model, sizes.num_experts, bias=False)

    def forward(self, tokens: Tensor, context: TokenContext) -> Chosen:
        return choose(self.gate(tokens))

    def flops(self, tokens: int, sentences: int) -> int:
        return 2 * self.gate.weight.numel() * tokens


def gate_token(sizes: RoutingSizes) -> TokenGate:
    """See :mod:`d2dmoe_pl.moe.routing`."""
    return TokenGate(sizes)


gate_token.needs_ids = gate_token.needs_counts = False
