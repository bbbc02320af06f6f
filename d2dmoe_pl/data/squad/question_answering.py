"""The task of finding the answer to a question in a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.squad.answer_spans import best_spans, merge_windows, null_scores
from d2dmoe_pl.data.squad.squad_score import SQuADScore
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.data.task import Batch, Task

WINDOW = ("questions", "scores", "spans", "null_scores")  # what is known of one, as merge_windows takes it


class QuestionAnswering(Task):
    """An answer's first and last token in each window.

    Logits are ``(B, 2, L)``, ``labels`` ``(B, 2)``; batches hold ``attention_mask`` ``(B, L)``, ``offsets``
    ``(B, L, 2)`` and ``question`` ``(B,)`` too. Padding takes no part in losses.

    Args:
        examples: By question index: ``context``, and ``answers`` with ``text``, a list of references.
        answerless: Whether contexts may hold no answer.
        n_best: Spans of each window among the predictions.
        max_answer_length: Longest answer, tokens.
        null_threshold: No answer is predicted where it beats the best span by more than this.
    """

    head: Head = "question-answering"
    main_metric = "f1"
    writes_rows = True

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        answerless: bool,
        n_best: int = 20,
        max_answer_length: int = 30,
        null_threshold: float = 0.0,
    ) -> None:
        self.label_names = ["start", "end"]
        self.examples = examples
        self.answerless = answerless
        self.n_best = n_best
        self.max_answer_length = max_answer_length
        self.null_threshold = null_threshold

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        # (B, 2, L) -> (2B, L): the mean of the start's and the end's cross-entropy
        return F.cross_entropy(_unpadded(logits, batch).flatten(0, 1), batch["labels"].flatten())

    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return symmetric_kl(_unpadded(student_logits, batch), _unpadded(teacher_logits, batch)).mean()

    def scores(self) -> dict[str, Metric]:
        score = SQuADScore(self.examples, self.answerless, self.null_threshold, self.max_answer_length)
        return {"squad": score}

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of each window its question, its best spans and the score of no answer.

        Returns:
            ``questions`` ``(B,)``; ``spans`` ``(B, n, 2)``, characters, best first, and their ``scores`` ``(B, n)``;
            ``null_scores`` ``(B,)``.
        """
        scores, spans = best_spans(logits, batch["offsets"], self.n_best, self.max_answer_length)
        return {"questions": batch["question"], "spans": spans, "scores": scores, "null_scores": null_scores(logits)}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """One row a window of a text, to be :meth:`joined`."""
        best = {"scores": outputs["scores"][:, 0], "spans": outputs["spans"][:, 0]}
        columns = ({**outputs, **best}[key].tolist() for key in WINDOW)
        return [dict(zip(WINDOW, window, strict=True)) for window in zip(*columns, strict=True)]

    def joined(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One row a question: its answer, empty if that is none, how far it beats none, and what its windows cost."""
        costs: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            cost = {key: value for key, value in row.items() if key not in WINDOW}
            costs.setdefault(row["questions"], []).append(cost)
        found = []
        for question, answer in merge_windows(*([row[key] for row in rows] for key in WINDOW)).items():
            asked, windows = self.examples[question], costs[question]
            is_none = self.answerless and answer.null_margin > self.null_threshold
            text = "" if is_none else answer.text(asked["context"])
            row = {"question": asked["question"], "prediction": text, "margin": -answer.null_margin}
            if windows[0]:
                row["experts_percent"] = sum(cost["experts_percent"] for cost in windows) / len(windows)
                row["flops"] = sum(cost["flops"] for cost in windows)
            found.append(row)
        return found


def _unpadded(logits: Tensor, batch: Batch) -> Tensor:
    """Logits ``(B, 2, L)`` that give padding no probability; finite, so that their differences are."""
    padding = batch["attention_mask"].unsqueeze(1) == 0  # (B, 1, L)
    return logits.float().masked_fill(padding, torch.finfo(torch.float32).min)
