"""A linear gate on each token."""

from torch import Tensor, nn

from d2dmoe_pl.moe.token_context import TokenContext
from d2dmoe_pl.moebert.routing import Decision, Routing, RoutingSizes, most_probable


class TokenGate(Routing):
    """The expert with the largest probability, its output scaled by it."""

    def __init__(self, sizes: RoutingSizes) -> None:
        super().__init__(sizes)
        self.gate = nn.Linear(sizes.d_model, sizes.num_experts, bias=False)

    def forward(self, tokens: Tensor, context: TokenContext) -> Decision:
        return most_probable(self.gate(tokens))

    def flops(self, tokens: int, sentences: int) -> int:
        return 2 * self.gate.weight.numel() * tokens


ROUTING = TokenGate
