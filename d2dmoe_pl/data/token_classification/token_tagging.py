"""The task of giving each word of a text a label."""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import LambdaInputTransformer

from d2dmoe_pl.data.language_modeling.token_prediction import NOT_PREDICTED, TokenPrediction


class TokenTagging(TokenPrediction):
    """One of ``C`` labels a word: logits ``(B, L, C)``, ``labels`` ``(B, L)``; cross-entropy, the mean over words.

    A word's label stands at its first token; the others have ``NOT_PREDICTED``. Where labels mark entities, as
    ``B-PER`` and ``I-PER`` do, the main metric is the F1 of whole entities, as ``seqeval`` finds them; else it is
    accuracy.

    Args:
        label_names: Names of the labels by their index.
    """

    in_percent = True
    higher_is_better = True
    writes_rows = True

    def __init__(self, label_names: Sequence[str]) -> None:
        super().__init__("token-classification", label_names)
        self.has_entities = any(name[:2] in ("B-", "I-") for name in label_names)
        self.main_metric = "f1" if self.has_entities else "accuracy"

    def with_label_names(self, label_names: Sequence[str]) -> "TokenTagging":
        return TokenTagging(label_names)  # which may mark entities where the data has numbers alone

    def scores(self) -> dict[str, Metric]:
        accuracy = MulticlassAccuracy(self.num_outputs, average="micro", ignore_index=NOT_PREDICTED)
        of_words: dict[str, Metric] = {"accuracy": LambdaInputTransformer(accuracy, _likeliest, _labels)}
        return {"f1": EntityF1(self.label_names), **of_words} if self.has_entities else of_words

    def predictions(self, logits: Tensor, batch: Any) -> dict[str, Tensor]:
        """The likeliest label of each word, ``(B, L)``, and ``NOT_PREDICTED`` where no word begins."""
        is_word = batch["labels"] != NOT_PREDICTED
        return {"predictions": logits.argmax(dim=-1).masked_fill(~is_word, NOT_PREDICTED)}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """One row a text: the labels of its words, parted by blanks."""
        columns = (
            {"prediction": outputs["predictions"]}
            if labels is None
            else {
                "label": labels,
                "prediction": outputs["predictions"],
            }
        )
        texts = [[" ".join(tags_of(row, self.label_names)) for row in column] for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*texts, strict=True)]


class EntityF1(Metric):
    """F1 of whole entities, type and extent, over all texts of all processes, as ``seqeval`` finds them.

    Args:
        label_names: Names of the labels by their index, with ``B-`` and ``I-`` before those of entities.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.data.token_classification.token_tagging import EntityF1
        >>> f1 = EntityF1(["O", "B-PER", "I-PER"])
        >>> f1.update(torch.eye(3)[[[1, 2, 0, 1]]], {"labels": torch.tensor([[1, 2, 0, 0]])})
        >>> f1.compute()
        tensor(0.6667)
    """

    full_state_update = False
    higher_is_better = True

    both: Tensor
    one: Tensor

    def __init__(self, label_names: Sequence[str]) -> None:
        super().__init__()
        self.label_names = list(label_names)
        # importing it changes which warnings are shown
        self._entities = resolve_name("seqeval.metrics.sequence_labeling:get_entities")
        self.add_state("both", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("one", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, batch: Any) -> None:
        """Add a batch: logits ``(B, L, C)``, and ``labels`` ``(B, L)`` in it."""
        predicted = logits.argmax(dim=-1).masked_fill(batch["labels"] == NOT_PREDICTED, NOT_PREDICTED)
        for guess, truth in zip(predicted, batch["labels"], strict=True):
            found, wanted = ({*self._entities(tags_of(row, self.label_names))} for row in (guess, truth))
            self.both += len(found & wanted)
            self.one += len(found) + len(wanted)

    def compute(self) -> Tensor:
        """The F1 so far: twice the entities that are right, among those found and those wanted."""
        return 2 * self.both / self.one.clamp(min=1)


def tags_of(labels: Tensor, label_names: Sequence[str]) -> list[str]:
    """Names of the labels ``(L,)`` of a text's words."""
    return [label_names[label] for label in labels[labels != NOT_PREDICTED].tolist()]


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _labels(batch: Any) -> Tensor:
    return batch["labels"]
