"""Routing by a fixed table from token id to expert: MoEBERT (arXiv 2204.07675), section 3.3."""

import heapq

import torch
from torch import Tensor

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.token_context import TokenContext
from d2dmoe_pl.moebert.routing._decision import Decision
from d2dmoe_pl.moebert.routing._routing import Routing, RoutingSizes


def random_table(vocabulary_size: int, num_experts: int, seed: int) -> Tensor:
    """An expert for each token id, drawn evenly: ``(vocabulary_size,)`` int64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_experts, (vocabulary_size,), generator=generator, device="cpu")


def balanced_table(counts: Tensor, num_experts: int, seed: int) -> Tensor:
    """An expert for each token id, so that experts get about equally many tokens.

    The most frequent id first (of equally frequent ones the smaller), each goes to the expert with the least load so
    far (of equally loaded ones the first); ids that never occur go anywhere.

    Args:
        counts: How often each token id occurs, ``(vocabulary_size,)`` integers.
        num_experts: ``E``.
        seed: Of where ids go that never occur.

    Returns:
        ``(vocabulary_size,)`` int64 on the CPU.
    """
    counts = counts.cpu()
    table = random_table(len(counts), num_experts, seed)
    loads = [(0, expert) for expert in range(num_experts)]
    for token_id in counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist():
        load, expert = loads[0]
        table[token_id] = expert
        heapq.heapreplace(loads, (load + int(counts[token_id]), expert))
    return table


def check_table(table: Tensor, vocabulary_size: int, num_experts: int, argument: str) -> None:
    """Raise ``ConfigError`` unless ``table``, which the user calls ``argument``, has an expert for each token id."""
    check(
        table.shape == (vocabulary_size,),
        f"{argument}: has {table.numel()} entries; must have one for each of the {vocabulary_size} token ids",
    )
    is_whole = not table.is_floating_point() and table.dtype != torch.bool
    check(is_whole, f"{argument}: has entries of {table.dtype}; must be integers")
    check(
        bool(((table >= 0) & (table < num_experts)).all()),
        f"{argument}: has entries from {int(table.min())} to {int(table.max())}; must lie in [0, num_experts), which "
        f"is {num_experts}",
    )


class HashRouting(Routing):
    """The expert that a table, saved with the model, has for the token's id; at first a random one.

    Args:
        sizes: What it is made for.
    """

    needs_ids = True
    table: Tensor

    def __init__(self, sizes: RoutingSizes) -> None:
        super().__init__(sizes)
        assert sizes.vocabulary_size is not None
        self.register_buffer("table", random_table(sizes.vocabulary_size, sizes.num_experts, sizes.seed))

    def forward(self, tokens: Tensor, context: TokenContext) -> Decision:
        assert context.token_ids is not None
        return Decision(self.table[context.token_ids])

    def flops(self, tokens: int, sentences: int) -> int:
        return 0
