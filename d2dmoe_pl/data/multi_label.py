"""Texts, or pairs of texts, each with any number of labels, from any Hugging Face dataset."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from torchmetrics.wrappers import LambdaInputTransformer

from d2dmoe_pl.data.class_labels import with_column
from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.listed_values import listed
from d2dmoe_pl.data.output_names import named_label, plain_name
from d2dmoe_pl.data.sample_names import sample_names
from d2dmoe_pl.data.task import Batch, Task
from d2dmoe_pl.data.text_classification import TextClassification
from d2dmoe_pl.errors import check, some_of

FLAGS = {"0": 0.0, "1": 1.0, "False": 0.0, "True": 1.0}  # whether a sample has a label, as files say it


class MultiLabel(Task):
    """Any of ``C`` labels a sample: logits ``(B, C)``, ``labels`` ``(B, C)``, 0 or 1; binary cross-entropy.

    A label is predicted where its logit is positive. The main metric is the F1 over all labels of all samples
    (micro); ``macro_f1`` is the mean over labels, ``exact_match`` the share of samples with all labels right.

    Args:
        label_names: Names of the labels by their index.
    """

    head: Head = "multi-label"
    main_metric = "f1"
    writes_rows = True

    def __init__(self, label_names: Sequence[str]) -> None:
        self.label_names = list(label_names)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    def prediction_loss(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """The symmetric KL divergence of each label's two outcomes, the mean over labels and samples."""
        student, teacher = student_logits.float(), teacher_logits.float()
        # of p and q with logits s and t: (p - q) (s - t), both directions together
        return 0.5 * ((student.sigmoid() - teacher.sigmoid()) * (student - teacher)).mean()

    def scores(self) -> dict[str, Metric]:
        number = self.num_outputs
        known = {
            "f1": MultilabelF1Score(number, average="micro"),
            "macro_f1": MultilabelF1Score(number, average="macro"),
            "exact_match": MultilabelExactMatch(number),
        }
        return {name: LambdaInputTransformer(metric, torch.sigmoid, _labels) for name, metric in known.items()}

    def predictions(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Which labels are given, ``(B, C)``, and the probability of each, ``(B, C)``."""
        return {"predictions": logits > 0, "probabilities": logits.sigmoid()}

    def rows(self, outputs: dict[str, Any], labels: Tensor | None) -> list[dict[str, Any]]:
        """Labels and predictions by name, parted by commas, and the probability of each label."""
        rows = []
        for i, given in enumerate(outputs["predictions"]):
            row = {} if labels is None else {"label": self._named(labels[i])}
            chances = zip(self.label_names, outputs["probabilities"][i].tolist(), strict=True)
            rows.append({**row, "prediction": self._named(given), **{f"probability of {n}": p for n, p in chances}})
        return rows

    def _named(self, given: Tensor) -> str:
        return ", ".join(name for name, is_given in zip(self.label_names, given.tolist(), strict=True) if is_given)


def _labels(batch: Any) -> Tensor:
    return batch["labels"].long()


class TextMultiLabel(TextClassification):
    """As ``TextClassification``, but each sample has any number of the labels, none of them included.

    It goes with ``HuggingFaceModel`` of the task ``multi-label-classification``.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B, C)``, 0
    or 1.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        label_columns: One column a label, of 0 and 1; or a single one that holds a sample's labels, as a list or as a
            text in which commas part them. Lists of 0 and 1 alone have a place for each label, which its number is.
        text_columns: One column, or two for sentence pairs.
        max_length: Tokens kept of a sample; at most what the model has positions for.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        group_by_length: Put samples of like length into one batch, which leaves less to pad.

    Raises:
        ConfigError: As of :class:`TextClassification`; to load, for labels that are neither, or that the training split
            has not.
    """

    head: Head = "multi-label"

    def __init__(
        self,
        source: DatasetSource,
        tokenizer: str,
        label_columns: list[str] = ["labels"],  # noqa: B006 (read only; jsonargparse shows it)
        text_columns: list[str] = ["text"],  # noqa: B006
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        group_by_length: bool = False,
    ) -> None:
        check(bool(label_columns), "label_columns=[]: must be one at least")
        check(
            len(set(label_columns)) == len(label_columns),
            f"label_columns={list(label_columns)}: names a column twice; must be another each",
        )
        super().__init__(
            source, tokenizer, text_columns, label_columns[0], max_length, batch_size, num_workers, group_by_length
        )
        self.label_columns = list(label_columns)

    def encoded(self, splits: Mapping[str, Dataset]) -> tuple[Mapping[str, Dataset], Task]:
        check_columns(splits, {f"label_columns[{i}]": column for i, column in enumerate(self.label_columns)})
        if len(self.label_columns) > 1:
            names = self.label_columns
            rows = {name: self._from_columns(split, name) for name, split in splits.items()}
        else:
            names, rows = self._from_lists(splits)
        encoded = {name: with_column(split, self.label_columns[0], rows[name]) for name, split in splits.items()}
        return encoded, MultiLabel(names)

    def _from_lists(self, splits: Mapping[str, Dataset]) -> tuple[list[str], dict[str, list[list[float]]]]:
        """The names of labels that are in one column, and which of them each sample of a split has."""
        lists = {name: self._lists(split, name) for name, split in splits.items()}
        if _are_flags([parts for _, parts in lists["train"]]):
            width = max(len(parts) for _, parts in lists["train"])
            rows = {name: self._from_flags(each, width) for name, each in lists.items()}
            return [str(place) for place in range(width)], rows
        given = {name: self._named(split, lists[name]) for name, split in splits.items()}
        names = sorted({label for sample in given["train"] for label in sample})
        check(len(names) > 1, f"label_columns={self.label_columns}: has fewer than two labels in the train split")
        return names, {name: [self._flags(sample, names, name) for sample in each] for name, each in given.items()}

    def _flags(self, sample: Sequence[str], names: Sequence[str], split: str) -> list[float]:
        unseen = sorted(set(sample) - set(names))
        check(
            not unseen,
            f"label_columns={self.label_columns}: the {split} split has labels unseen in training: "
            f"{some_of(unseen, 5)}; allowed are {some_of(names)}",
        )
        return [float(name in sample) for name in names]

    def _from_columns(self, split: Dataset, split_name: str) -> list[list[float]]:
        columns, samples = [split[column] for column in self.label_columns], sample_names(split, split_name)
        for column, values in zip(self.label_columns, columns, strict=True):
            for sample, value in zip(samples, values, strict=True):
                check(_flag(value) is not None, f"label_columns={column!r}: {sample} has {value!r}; must be 0 or 1")
        return [[_flag(value) or 0.0 for value in row] for row in zip(*columns, strict=True)]

    def _lists(self, split: Dataset, split_name: str) -> list[tuple[str, list[Any]]]:
        """Where each sample is, and the parts of its labels as they are."""
        (column,) = self.label_columns
        found = []
        for sample, value in zip(sample_names(split, split_name), split[column], strict=True):
            check(
                value is None or isinstance(value, str | list),
                f"label_columns={column!r}: {sample} has {value!r}; must be a list of labels, or a text in which "
                "commas part them",
            )
            where = f"label_columns={column!r}: {sample}"
            found.append((where, listed(value, ",", where)))
        return found

    def _from_flags(self, lists: Sequence[tuple[str, list[Any]]], width: int) -> list[list[float]]:
        for where, parts in lists:
            check(
                len(parts) in (0, width) and None not in map(_flag, parts),
                f"{where} has {str(parts)[:60]}; must be {width} numbers of 0 and 1, one a label",
            )
        return [[_flag(part) or 0.0 for part in parts] or [0.0] * width for _, parts in lists]

    def _named(self, split: Dataset, lists: Sequence[tuple[str, list[Any]]]) -> list[list[str]]:
        (column,) = self.label_columns
        names = getattr(getattr(split.features[column], "feature", None), "names", None)
        named = [[named_label(part, names, where) for part in parts] for where, parts in lists]
        if names is None:
            _check_parted(named, [where for where, _ in lists])
        return [[name for name in sample if name] for sample in named]


def _check_parted(named: Sequence[Sequence[str]], where: Sequence[str]) -> None:
    """Raise ``ConfigError`` where labels of one sample are parted by another sign than commas."""
    for sign in ";|":
        found = {name for sample in named for name in sample}
        known = Counter(part.strip() for name in found for part in name.split(sign))
        for names, place in zip(named, where, strict=True):
            for name in names:
                is_several = sign in name and any(known[part.strip()] > 1 for part in name.split(sign))
                said = f"{place} has {name!r}, parts of which are labels too; must be parted by commas, or be a list"
                check(not is_several, said)


def _flag(value: Any) -> float | None:
    """Whether a value says that a label is there; None if it says neither."""
    return FLAGS.get(plain_name(value).capitalize())


def _are_flags(lists: Sequence[Sequence[Any]]) -> bool:
    """Whether lists have a 0 or a 1 for each label, rather than the labels: one of two names is in no list twice."""
    given = [parts for parts in lists if parts]
    is_twice = any(len(parts) > len(set(map(plain_name, parts))) for parts in given)
    are_whole = bool(given) and all(len(parts) > 1 for parts in given)
    return (is_twice or are_whole) and None not in {_flag(part) for parts in given for part in parts}
