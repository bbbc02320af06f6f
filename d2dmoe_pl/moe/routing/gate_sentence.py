"""A linear gate on the mean of each sentence's tokens: a sentence goes to one expert."""

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.chosen import Chosen, RoutingSizes, choose
from d2dmoe_pl.moe.context import TokenContext


class SentenceGate(nn.Module):
    """The expert with the largest probability for the sentence, its output scaled by it."""

    def __init__(self, sizes: RoutingSizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.d_model, sizes.num_experts, bias=False)

    def forward(self, tokens: Tensor, context: TokenContext) -> Chosen:
        sentence = context.sentence  # (N,)
        chosen = choose(self.gate(sentence_means(tokens, sentence)))
        return Chosen(chosen.expert[sentence], chosen.scale[sentence], chosen.balance_loss)

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
    sums = torch.zeros(len(lengths), tokens.shape[1], device=tokens.device).index_add(0, sentence, tokens.float())
    return (sums / lengths.unsqueeze(1)).to(tokens.dtype)


def gate_sentence(sizes: RoutingSizes) -> SentenceGate:
    """See :mod:`d2dmoe_pl.moe.routing`."""
    return SentenceGate(sizes)


gate_sentence.needs_ids, gate_sentence.needs_counts = True, False  # where sentences begin is seen from the ids
