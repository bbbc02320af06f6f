"""How many experts each token runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class LayerLoad(NamedTuple):
    """What tokens had one layer do.

    Attributes:
        histogram: How many tokens ran 0, 1, ..., E experts, ``(E + 1,)`` int64.
        work: Over all tokens, in executed (token, expert) pairs; those of which values are left out count in part.
    """

    histogram: Tensor
    work: float


def experts_histogram(mask: Tensor) -> Tensor:
    """How many tokens run 0, 1, ..., E experts.

    Args:
        mask: Boolean ``(N, E)``.

    Returns:
        ``(E + 1,)`` int64, which sums to ``N``.
    """
    return torch.bincount(mask.sum(dim=1), minlength=mask.shape[1] + 1)


class ExpertLoad(Metric):
    """Per layer, the histogram of experts run by a token, and what they did, summed over batches and processes.

    Args:
        num_experts: ``E`` of each layer.
    """

    full_state_update = False

    work: Tensor

    def __init__(self, num_experts: Sequence[int]) -> None:
        super().__init__()
        self.num_experts = list(num_experts)
        for layer, experts in enumerate(self.num_experts):
            self.add_state(self._state(layer), torch.zeros(experts + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("work", torch.zeros(len(self.num_experts), dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    def _state(layer: int) -> str:
        return f"histogram_{layer}"

    def update(self, layer: int, mask: Tensor) -> None:
        """Add one layer's routing decisions, a boolean mask ``(N, E)``."""
        state = self._state(layer)
        setattr(self, state, getattr(self, state) + experts_histogram(mask))

    def update_work(self, layer: int, work: Tensor) -> None:
        """Add what each token had one layer do, in executed pairs, ``(N,)``."""
        self.work[layer] += work.sum()

    def compute(self) -> list[LayerLoad]:
        """What tokens had each layer do."""
        return [LayerLoad(getattr(self, self._state(layer)), work) for layer, work in enumerate(self.work.tolist())]


def executed_pairs(histogram: Tensor) -> int:
    """``P``, the (token, expert) pairs that ran, from a histogram ``(E + 1,)``."""
    return int((histogram * torch.arange(len(histogram), device=histogram.device)).sum())
