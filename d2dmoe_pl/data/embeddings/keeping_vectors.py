"""The task of giving texts the vectors that another model gives them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.task import Batch, Task, random_signs

COMPARED = 1000  # texts that are compared with one another


class KeepingVectors(Task):
    """A vector a text: logits ``(B, d)``, and the one it is to keep, ``labels`` ``(B, d)``; relative squared error.

    The main metric is the mean cosine to the vector that is to be kept. ``rank_correlation`` says whether pairs of
    texts are as alike as they were, as benchmarks of textual similarity measure it (Spearman's, over all pairs of 1,000
    texts); ``neighbours``, whether a search finds what it found: how many of a text's ten nearest are.

    Args:
        width: ``d``.
        normalizes: Whether a text's vector is of length 1, whatever the model gives.
    """

    head: Head = "embedding"
    main_metric = "cosine"
    writes_rows = True

    def __init__(self, width: int, normalizes: bool = True) -> None:
        self.normalizes = normalizes
        self.label_names = [str(index) for index in range(width)]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return relative_squared_error(logits, batch["labels"])

    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return relative_squared_error(student_logits, teacher_logits)

    def curvature_loss(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        vectors = logits.float()
        scaled = vectors / vectors.detach().norm(dim=1, keepdim=True).clamp(min=1e-6)  # (B, d)
        return 2**0.5 * (random_signs(scaled, seed) * scaled).sum(dim=1).mean()

    def scores(self) -> dict[str, Metric]:
        return {"cosine": MeanCosine(), "kept": KeptNeighbourhoods()}

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Vectors ``(B, d)``."""
        return {"predictions": F.normalize(logits.float(), dim=1) if self.normalizes else logits.float()}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """One row a text: its vector, a column a coordinate."""
        return [dict(zip(self.label_names, vector, strict=True)) for vector in outputs["predictions"].tolist()]


def relative_squared_error(vectors: Tensor, wanted: Tensor) -> Tensor:
    """The mean over texts of ``|v - w|^2 / |w|^2``, a scalar; of vectors ``(B, d)`` each."""
    vectors, wanted = vectors.float(), wanted.float()
    return ((vectors - wanted).square().sum(dim=1) / wanted.square().sum(dim=1).clamp(min=1e-12)).mean()


class MeanCosine(MeanMetric):
    """Mean cosine of two vectors a text, over batches and processes."""

    higher_is_better = True  # type: ignore[assignment] # torchmetrics leaves it open for means

    def update(self, logits: Tensor, batch: Any) -> None:  # type: ignore[override] # as all metrics of a task
        """Add a batch."""
        super().update(F.cosine_similarity(logits.float(), batch["labels"].float(), dim=1))


class KeptNeighbourhoods(Metric):
    """Whether texts are as near to one another as they were, by the cosines of their vectors: of 1,000 at most.

    These are the same whatever the order that texts come in, as by length, where the first are the shortest.

    Args:
        nearest: Texts that count as a text's neighbours.
    """

    full_state_update = False

    vectors: list[Tensor]
    wanted: list[Tensor]
    lots: list[Tensor]

    def __init__(self, nearest: int = 10) -> None:
        super().__init__()
        self.nearest = nearest
        self.add_state("vectors", [], dist_reduce_fx="cat")
        self.add_state("wanted", [], dist_reduce_fx="cat")
        self.add_state("lots", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, batch: Any) -> None:
        """Add a batch."""
        self.vectors.append(F.normalize(logits.float(), dim=1))
        self.wanted.append(F.normalize(batch["labels"].float(), dim=1))
        self.lots.append(_lots(batch["labels"]))

    def compute(self) -> dict[str, Tensor]:
        """``rank_correlation`` of all pairs, and ``neighbours``, the share of those wanted that are found."""
        drawn = dim_zero_cat(self.lots).sort(stable=True).indices[:COMPARED]
        found, wanted = (dim_zero_cat(each)[drawn] for each in (self.vectors, self.wanted))
        number = len(found)
        likeness, likeness_wanted = found @ found.t(), wanted @ wanted.t()  # (N, N)
        i, j = torch.triu_indices(number, number, offset=1, device=found.device)
        if len(i) < 2:
            return {"rank_correlation": likeness.new_tensor(1.0), "neighbours": likeness.new_tensor(1.0)}
        correlation = spearman_corrcoef(likeness[i, j], likeness_wanted[i, j])
        most = min(self.nearest, number - 1)
        itself = torch.eye(number, dtype=torch.bool, device=found.device)
        near, near_wanted = (
            each.masked_fill(itself, -2.0).topk(most, dim=1).indices for each in (likeness, likeness_wanted)
        )  # (N, most)
        shared = (near.unsqueeze(2) == near_wanted.unsqueeze(1)).any(dim=2).float().mean()
        return {"rank_correlation": correlation, "neighbours": shared}


def _lots(vectors: Tensor) -> Tensor:
    """A whole number a text, ``(B,)``, of its vector ``(B, d)``: the same on any device, and as if drawn at random."""
    bits = vectors.float().contiguous().view(torch.int32).long()  # (B, d)
    odd = 2 * torch.arange(vectors.shape[1], device=vectors.device) + 1
    return ((bits * odd * 2654435761) % 2147483647).sum(dim=1) * 48271 % 2147483647
