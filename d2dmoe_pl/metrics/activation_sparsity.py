"""How sparse activations are."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

SHARES = (0.1, 0.01, 0.001)


def sparsity_counts(activation: Tensor) -> Tensor:
    """Neurons at exactly zero, and below 1/10, 1/100 and 1/1000 of their token's largest magnitude.

    Args:
        activation: ``(N, d_ff)``.

    Returns:
        ``(4,)`` int64 counts.
    """
    magnitude = activation.abs()
    largest = magnitude.amax(dim=-1, keepdim=True)  # (N, 1)
    is_zero = magnitude == 0  # below any share, of a token that has nothing else too
    return torch.stack([is_zero.sum(), *((is_zero | (magnitude < share * largest)).sum() for share in SHARES)])


class ActivationSparsity(Metric):
    """Per FFN, the shares of :func:`sparsity_counts` among all activations, over batches and processes.

    Args:
        names: Names of the FFNs.
    """

    full_state_update = False

    below: Tensor
    total: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("below", torch.zeros(len(self.names), 1 + len(SHARES), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, name: str, activation: Tensor) -> None:
        """Add activations ``(N, d_ff)`` of the FFN ``name``."""
        index = self.names.index(name)
        self.below[index] += sparsity_counts(activation)
        self.total[index] += activation.numel()

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Scalars in [0, 1] by ``zeros``, ``below_0.1`` and so on, and by the FFN's name."""
        shares = self.below / self.total.clamp(min=1).unsqueeze(1)  # (FFNs, 4)
        kinds = ["zeros", *(f"below_{share}" for share in SHARES)]
        return {
            kind: {name: shares[i, j] for i, name in enumerate(self.names)}  # scalars
            for j, kind in enumerate(kinds)
        }
