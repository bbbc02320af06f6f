"""How many experts each token runs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def experts_histogram(mask: Tensor) -> Tensor:
    """How many tokens run 0, 1, ..., E experts.

    Args:
        mask: Boolean ``(N, E)``.

    Returns:
        ``(E + 1,)`` int64, which sums to ``N``.
    """
    return torch.bincount(mask.sum(dim=1), minlength=mask.shape[1] + 1)


class ExpertLoad(Metric):
    """Per layer, the histogram of experts run by a token, summed over batches and processes.

    Args:
        num_experts: ``E`` of each layer.
    """

    full_state_update = False

    def __init__(self, num_experts: Sequence[int]) -> None:
        super().__init__()
        self.num_experts = list(num_experts)
        for layer, experts in enumerate(self.num_experts):
            self.add_state(self._state(layer), torch.zeros(experts + 1, dtype=torch.int64), dist_reduce_fx="sum")

    @staticmethod
    def _state(layer: int) -> str:
        return f"histogram_{layer}"

    def update(self, layer: int, mask: Tensor) -> None:
        """Add one layer's routing decisions, a boolean mask ``(N, E)``."""
        state = self._state(layer)
        setattr(self, state, getattr(self, state) + experts_histogram(mask))

    def compute(self) -> list[Tensor]:
        """Per layer, the number of tokens that run 0, 1, ..., E experts: ``(E + 1,)`` int64."""
        return [getattr(self, self._state(layer)) for layer in range(len(self.num_experts))]


def executed_pairs(histogram: Tensor) -> int:
    """``P``, the (token, expert) pairs that ran, from a histogram ``(E + 1,)``."""
    return int((histogram * torch.arange(len(histogram), device=histogram.device)).sum())
