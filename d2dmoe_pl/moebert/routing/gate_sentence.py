"""A linear gate on the mean of each sentence's tokens: a sentence goes to one expert."""

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.token_context import TokenContext
from d2dmoe_pl.moebert.routing import Decision, Routing, RoutingSizes, most_probable


class SentenceGate(Routing):
    """The expert with the largest probability for the sentence, its output scaled by it."""

    needs_ids = True  # where sentences begin is seen from them

    def __init__(self, sizes: RoutingSizes) -> None:
        super().__init__(sizes)
        self.gate = nn.Linear(sizes.d_model, sizes.num_experts, bias=False)

    def forward(self, tokens: Tensor, context: TokenContext) -> Decision:
        sentence = context.sentence  # (N,)
        assert sentence is not None
        decision = most_probable(self.gate(sentence_means(tokens, sentence)))
        assert decision.scale is not None
        return Decision(decision.expert[sentence], decision.scale[sentence], decision.balance_loss)

    def flops(self, tokens: int, sentences: int) -> int:
        return 2 * self.gate.weight.numel() * sentences


def sentence_means(tokens: Tensor, sentence: Tensor) -> Tensor:
    """Mean of each sentence's tokens.

    Args:
        tokens: ``(N, d)``, no padding among them.
        sentence: Of each token, ``(N,)``; all of 0 to ``S - 1`` occur.

    Returns:
        ``(S, d)``.
    """
    lengths = torch.bincount(sentence)  # (S,)
    wide = tokens.float()
    sums = wide.new_zeros(lengths.shape[0], tokens.shape[1]).index_add(0, sentence, wide)
    return (sums / lengths.unsqueeze(1)).to(tokens.dtype)


ROUTING = SentenceGate
