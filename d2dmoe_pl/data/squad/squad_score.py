"""Exact match and F1 as the official SQuAD evaluation computes them (arXiv 1606.05250, 1806.03822)."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from d2dmoe_pl.data.squad.answer_spans import best_spans, merge_windows, null_scores


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if the two are the same once normalised, else 0."""
    return float(normalise(prediction) == normalise(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall in words; without any words in either, 1 if both are empty, else 0."""
    predicted, expected = normalise(prediction).split(), normalise(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def against_all(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, each with the reference that suits it best; no reference means that "" is right."""
    references = [reference for reference in references if normalise(reference)] or [""]
    exact, overlap = (max(score(prediction, reference) for reference in references) for score in (exact_match, f1))
    return exact, overlap


def best_threshold(answered: Tensor, unanswered: Tensor, margins: Tensor) -> tuple[float, float]:
    """The threshold that gives the best mean score when a margin above it means "no answer".

    Args:
        answered: Score of each question's best span, ``(Q,)``.
        unanswered: Its score with no answer given, ``(Q,)``.
        margins: By how much no answer beats the best span, ``(Q,)``.

    Returns:
        The mean score, and the threshold: one of the margins, or one below them all.
    """
    margins, order = margins.sort()
    means = (unanswered.sum() + (answered - unanswered)[order].cumsum(0)) / len(order)
    # equal margins cannot be told apart by a threshold
    means[:-1] = means[:-1].masked_fill(margins[1:] == margins[:-1], float("-inf"))
    best = means.argmax()
    if means[best] <= unanswered.mean():
        return float(unanswered.mean()), float(margins[0]) - 1
    return float(means[best]), float(margins[best])


class SQuADScore(Metric):
    """Exact match and F1 of questions, each over all windows of its context, wherever these were seen.

    Keeps each window's best span; questions are put together from all batches and processes when computed.

    Args:
        examples: By question index: ``context``, and ``answers`` with ``text``, a list of references.
        answerless: Whether contexts may hold no answer, as in version 2.0.
        null_threshold: No answer is predicted where it beats the best span by more than this.
        max_answer_length: Longest answer, tokens.
    """

    full_state_update = False
    higher_is_better = True
    questions: list[Tensor]
    scores: list[Tensor]
    spans: list[Tensor]
    nulls: list[Tensor]

    def __init__(
        self, examples: Sequence[Mapping[str, Any]], answerless: bool, null_threshold: float, max_answer_length: int
    ) -> None:
        super().__init__()
        self.examples = examples
        self.answerless = answerless
        self.null_threshold = null_threshold
        self.max_answer_length = max_answer_length
        for state in ("questions", "scores", "spans", "nulls"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add windows: logits ``(B, 2, L)``, and a batch with ``offsets`` ``(B, L, 2)`` and ``question`` ``(B,)``."""
        scores, spans = best_spans(logits, batch["offsets"], 1, self.max_answer_length)
        self.questions.append(batch["question"])
        self.scores.append(scores[:, 0])
        self.spans.append(spans[:, 0])
        self.nulls.append(null_scores(logits))

    def compute(self) -> dict[str, Tensor]:
        """``exact_match`` and ``f1`` in [0, 1].

        Where contexts may hold no answer also the two over the questions with an answer (``has_answer_...``), the share
        of the others that get none (``no_answer_accuracy``), if there are any, and what the best threshold would give,
        and that threshold (``best_...``, ``best_..._threshold``).
        """
        windows = (dim_zero_cat(state).tolist() for state in (self.questions, self.scores, self.spans, self.nulls))
        answers = merge_windows(*windows)
        examples = [self.examples[question] for question in answers]
        references = [example["answers"]["text"] for example in examples]
        texts = [answer.text(example["context"]) for answer, example in zip(answers.values(), examples, strict=True)]
        answered = _scores(texts, references)  # (Q, 2)
        if not self.answerless:
            results = _means("", answered)
        else:
            margins = torch.tensor([answer.null_margin for answer in answers.values()])
            has_answer = torch.tensor([len(allowed) > 0 for allowed in references])
            unanswered = (~has_answer).float().unsqueeze(1).expand_as(answered)  # whatever an answer is normalised to
            scores = torch.where((margins > self.null_threshold).unsqueeze(1), unanswered, answered)
            results = _means("", scores)
            if has_answer.any():
                results |= _means("has_answer_", scores[has_answer])
            if not has_answer.all():
                results["no_answer_accuracy"] = float(scores[~has_answer, 0].mean())
            for column, name in enumerate(("exact_match", "f1")):
                mean, threshold = best_threshold(answered[:, column], unanswered[:, column], margins)
                results |= {f"best_{name}": mean, f"best_{name}_threshold": threshold}
        return {name: torch.tensor(value, device=self.device) for name, value in results.items()}


def _scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    pairs = zip(texts, references, strict=True)
    return torch.tensor([against_all(text, allowed) for text, allowed in pairs])


def _means(prefix: str, scores: Tensor) -> dict[str, float]:
    means = scores.mean(dim=0).tolist()
    return {f"{prefix}exact_match": means[0], f"{prefix}f1": means[1]}
