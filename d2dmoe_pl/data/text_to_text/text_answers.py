"""The task of answering a text with a text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassExactMatch
from torchmetrics.text import CHRFScore, SacreBLEUScore
from torchmetrics.wrappers import LambdaInputTransformer
from torchmetrics.wrappers.abstract import WrapperMetric

from d2dmoe_pl.data.language_modeling.token_prediction import NOT_PREDICTED, TokenPrediction
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check

# of texts that the model writes itself, token after token; with what torchmetrics calls them
OF_WRITTEN: dict[str, Callable[[], Metric]] = {"chrf": partial(CHRFScore, n_word_order=0), "bleu": SacreBLEUScore}
METRICS = ("exact_match", *OF_WRITTEN)


class TextAnswers(TokenPrediction):
    """A text a sample: logits ``(B, L, V)`` of the answer's tokens, ``labels`` ``(B, L)``; cross-entropy.

    Answers match exactly where each token is the likeliest after those before it, which are then those that greedy
    decoding writes: no text has to be written to know. Other metrics compare what the model writes, greedily, in
    ``written`` ``(B, L)`` of the batch.

    Args:
        tokens: The vocabulary, by token id.
        decode: Token ids to the text that they are, special tokens left out.
        metrics: Of ``exact_match``, ``chrf`` and ``bleu``; the first is the main one.
        max_target_length: Tokens that a model writes at most.

    Raises:
        ConfigError: For another metric, or none.
    """

    in_percent = True
    higher_is_better = True
    writes_rows = True

    def __init__(
        self,
        tokens: Sequence[str],
        decode: Callable[[list[int]], str],
        metrics: Sequence[str] = ("exact_match",),
        max_target_length: int = 32,
    ) -> None:
        super().__init__("text-to-text", tokens)
        check(
            bool(metrics) and set(metrics) <= set(METRICS), f"metrics={list(metrics)}: allowed are {', '.join(METRICS)}"
        )
        self.main_metric = metrics[0]
        self.decode = decode
        self._names = tuple(metrics)
        self.measures_written = bool(set(metrics) & OF_WRITTEN.keys())
        self.most_written = max_target_length

    @property
    def is_share_of_samples(self) -> bool:
        return self.main_metric == "exact_match"

    def scores(self) -> dict[str, Metric]:
        return {name: self._score(name) for name in self._names}

    def _score(self, name: str) -> Metric:
        if name in OF_WRITTEN:
            return WrittenText(OF_WRITTEN[name](), self)
        exact = MulticlassExactMatch(len(self.label_names), ignore_index=NOT_PREDICTED, validate_args=False)
        return LambdaInputTransformer(exact, _likeliest, _labels)

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The token ids that the model has written, ``(B, L)``."""
        return {"predictions": batch["written"]}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """One row a sample: the text that is written, and the one that was to be."""
        texts = [self.decode(ids) for ids in outputs["predictions"].tolist()]
        if labels is None:
            return [{"prediction": text} for text in texts]
        return [{"label": self.text_of(ids), "prediction": text} for text, ids in zip(texts, labels, strict=True)]

    def text_of(self, labels: Tensor) -> str:
        """The text that the labels ``(L,)`` of a sample are."""
        return self.decode(labels[labels != NOT_PREDICTED].tolist())


class WrittenText(WrapperMetric):
    """A metric of torchmetrics over texts, for what a model has written and what it was to write.

    Args:
        metric: Takes texts, and a list of references for each.
        task: Knows the texts.
    """

    def __init__(self, metric: Metric, task: TextAnswers) -> None:
        super().__init__()
        self.metric = metric
        self.task = task

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Add a batch, by what is ``written`` in it."""
        written = [self.task.decode(ids) for ids in batch["written"].tolist()]
        self.metric.update(written, [[self.task.text_of(labels)] for labels in batch["labels"]])

    def compute(self) -> Tensor:
        """The metric so far."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forget what was added."""
        self.metric.reset()
        super().reset()


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _labels(batch: Any) -> Tensor:
    return batch["labels"]
