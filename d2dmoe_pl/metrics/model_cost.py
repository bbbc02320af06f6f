"""What samples cost outside the FFNs, added up."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ModelCost(Metric):
    """Samples seen, and their FLOPs outside the FFNs, over batches and processes."""

    full_state_update = False

    samples: Tensor
    flops: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("flops", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, flops: Sequence[int]) -> None:
        """Add samples by the FLOPs of each."""
        self.samples += len(flops)
        self.flops += sum(flops)

    def compute(self) -> tuple[int, int]:
        """Number of samples, and the sum of their FLOPs."""
        return int(self.samples), int(self.flops)
