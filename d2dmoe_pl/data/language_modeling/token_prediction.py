"""Language modelling as a task: tell the token that belongs at a position. Causal and masked differ in data alone."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.data.task import Batch, MeanLoss, Task

NOT_PREDICTED = -100  # the label of a position where nothing is to be told


class TokenPrediction(Task):
    """A token of a vocabulary of ``V`` a position: logits ``(B, L, V)``, ``labels`` ``(B, L)``; cross-entropy.

    A label is what the logits at its own position are to tell, the next token or a masked one, or ``NOT_PREDICTED``.
    Every mean is over the tokens that are predicted, and 0 where none is. A model may have more outputs
    than there are tokens.

    Args:
        head: The head that a model needs.
        tokens: The vocabulary, by token id.
    """

    main_metric = "perplexity"
    in_percent = False
    higher_is_better = False

    def __init__(self, head: Head, tokens: Sequence[str]) -> None:
        self.head = head
        self.label_names = list(tokens)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        logits, labels = logits.flatten(0, 1).float(), batch["labels"].flatten()  # (B * L, V), (B * L,)
        total = F.cross_entropy(logits, labels, ignore_index=NOT_PREDICTED, reduction="sum")
        return total / (labels != NOT_PREDICTED).sum().clamp(min=1)

    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        predicted = batch["labels"] != NOT_PREDICTED
        divergences = symmetric_kl(student_logits[predicted], teacher_logits[predicted])  # (N, V) each to (N,)
        return divergences.sum() / max(1, len(divergences))

    def weight(self, batch: Batch) -> int:
        """Tokens that are predicted."""
        return int((batch["labels"] != NOT_PREDICTED).sum())

    def scores(self) -> dict[str, Metric]:
        return {"perplexity": Perplexity(self.loss, self.weight)}

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The likeliest token at each position, ``(B, L)``."""
        return {"predictions": logits.argmax(dim=-1)}


class Perplexity(MeanLoss):
    """The exponential of the mean loss of all predicted tokens, over batches and processes; 1 is best."""

    higher_is_better = False  # type: ignore[assignment] # torchmetrics leaves it open for means

    def compute(self) -> Tensor:
        """The perplexity so far."""
        return torch.exp(super().compute())
