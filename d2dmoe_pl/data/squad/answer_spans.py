"""From scores of tokens to answers: the best spans of each window, and of each question over its windows."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from d2dmoe_pl.data.squad.question_windows import NO_ANSWER, OUTSIDE


def best_spans(logits: Tensor, offsets: Tensor, n_best: int, max_answer_length: int) -> tuple[Tensor, Tensor]:
    """The ``n_best`` spans of each window's context, by the sum of their start's and end's logits; none is left out.

    Args:
        logits: Of each token as an answer's first and last, ``(B, 2, L)``.
        offsets: Each token's characters in its context, ``(B, L, 2)``; -1 for tokens that are not of the context.
        n_best: Spans wanted.
        max_answer_length: Longest span, tokens.

    Returns:
        Scores ``(B, n)``, best first, ``n <= n_best``, and characters ``(B, n, 2)``: first, and past the last. Where
        there are not that many spans the score is ``-inf`` and the characters are -1.
    """
    length = logits.shape[-1]
    longest = min(max_answer_length, length)
    outside = offsets[..., 0] == OUTSIDE[0]  # (B, L)
    start, end = logits.float().masked_fill(outside.unsqueeze(1), float("-inf")).unbind(dim=1)
    # ends[:, i, j] is the end's logit where a span of j + 1 tokens begins at i
    ends = F.pad(end, (0, longest - 1), value=float("-inf")).unfold(1, longest, 1)  # (B, L, longest)
    scores, index = (start.unsqueeze(2) + ends).flatten(1).topk(min(n_best, length * longest))  # (B, n)
    first = index // longest
    last = (first + index % longest).clamp(max=length - 1)
    characters = F.pad(offsets[..., :1].gather(1, first.unsqueeze(2)), (0, 1))  # (B, n, 2)
    characters[..., 1] = offsets[..., 1].gather(1, last)
    return scores, characters.masked_fill(scores.isneginf().unsqueeze(2), OUTSIDE[0])


def null_scores(logits: Tensor) -> Tensor:
    """The score of there being no answer in each window, ``(B,)``, from logits ``(B, 2, L)``."""
    return logits[:, :, NO_ANSWER].float().sum(dim=1)


@dataclass
class Answer:
    """The best answer to a question over all windows of its context.

    Attributes:
        score: Of its best span.
        span: Its characters in the context: first, and past the last.
        null_score: Of there being no answer: the smallest over the windows, since most windows hold none.
    """

    score: float
    span: tuple[int, int]
    null_score: float

    @property
    def null_margin(self) -> float:
        """By how much no answer beats the best span."""
        return self.null_score - self.score

    def text(self, context: str) -> str:
        """The best span's text; empty if there was none."""
        start, end = self.span
        return "" if self.span == OUTSIDE else context[start:end]


def merge_windows(
    questions: Sequence[int], scores: Sequence[float], spans: Sequence[Sequence[int]], nulls: Sequence[float]
) -> dict[int, Answer]:
    """The answer to each question, from its windows in any order.

    Args:
        questions: The question of each window.
        scores: The score of its best span.
        spans: That span's characters.
        nulls: The score of no answer in it.

    Returns:
        By question, in order of questions.
    """
    merged: dict[int, Answer] = {}
    for question, score, span, null in zip(questions, scores, spans, nulls, strict=True):
        answer = Answer(score, (span[0], span[1]), null)
        before = merged.get(question, answer)
        # of equal scores the later span, so that the order of windows does not matter
        best = max(before, answer, key=lambda one: (one.score, one.span))
        merged[question] = Answer(best.score, best.span, min(before.null_score, null))
    return dict(sorted(merged.items()))
