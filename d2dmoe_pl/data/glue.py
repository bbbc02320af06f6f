"""The nine tasks of GLUE (arXiv 1804.07461)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from datasets import ClassLabel, Dataset

from d2dmoe_pl.data.class_labels import with_column
from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.output_names import plain_name
from d2dmoe_pl.data.task import Classification, Regression, Task
from d2dmoe_pl.data.text_classification import check_texts, parted_texts
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.notices import notice

HUB = "nyu-mll/glue"
UNLABELLED = ("-1", "", "None", "nan")  # -1 on the hub
Name = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


@dataclass(frozen=True)
class GLUETask:
    """What one task of GLUE is made of.

    Attributes:
        columns: Its texts: one column, or two for pairs.
        label_names: Classes by index; none for a number.
        metrics: Its official metrics, the main one first; those of :class:`d2dmoe_pl.data.task.Regression` if none.
    """

    columns: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def task(self) -> Task:
        """Classes, or a number from 0 to 5."""
        return Classification(self.label_names, self.metrics) if self.label_names else Regression("similarity")


_ACCURACY = ("accuracy",)
_SENTENCES = ("sentence1", "sentence2")
GLUE_TASKS: dict[str, GLUETask] = {
    "cola": GLUETask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GLUETask(("sentence",), ("negative", "positive"), _ACCURACY),
    "mrpc": GLUETask(_SENTENCES, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "stsb": GLUETask(_SENTENCES),
    "qqp": GLUETask(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "mnli": GLUETask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), _ACCURACY),
    "qnli": GLUETask(("question", "sentence"), ("entailment", "not_entailment"), _ACCURACY),
    "rte": GLUETask(_SENTENCES, ("entailment", "not_entailment"), _ACCURACY),
    "wnli": GLUETask(_SENTENCES, ("not_entailment", "entailment"), _ACCURACY),
}


class GLUE(TokenizedData):
    """One of the nine GLUE tasks, with its official metrics.

    A test split without labels (all -1, as on the hub, all missing, or without the column) is replaced by the
    validation split. MNLI has two validation sets: the matched one is ``validation``, the other
    ``validation_mismatched``; so for test.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B,)``.

    Args:
        name: The task.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        source: Where the splits are, with the hub's columns; ``label`` may hold indices or names. The hub's
            ``nyu-mll/glue`` if not given. MNLI's second validation set from files is
            ``more: {validation_mismatched: FILE}``.
        max_length: Tokens kept of a sample; at most what the model has positions for.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For an unknown task or a ``max_length`` that is not positive; to load, for a tokenizer that is not
            there.
    """

    def __init__(
        self,
        name: Name,
        tokenizer: str,
        source: DatasetSource | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers)
        check(name in GLUE_TASKS, f"name={name!r}: allowed are {', '.join(get_args(Name))}")
        self.name = name
        self.source = hub_source(name) if source is None else source
        self.head = GLUE_TASKS[name].task().head
        self._tests_are_validation = False

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load()
        made_of = GLUE_TASKS[str(self.name)]
        check_columns(splits, {f"{self.name} column {i}": name for i, name in enumerate(made_of.columns)})
        for name, split in splits.items():
            for column in made_of.columns:
                check_texts(split, column, name, "column", may_be_blank=True)
        self.check_known(splits["train"][made_of.columns[0]])
        self._tests_are_validation = is_unlabelled(splits["test"])
        if self._tests_are_validation:
            validation = {name: split for name, split in splits.items() if name.startswith("validation")}
            splits = {name: split for name, split in splits.items() if not name.startswith("test")}
            splits |= {name.replace("validation", "test", 1): split for name, split in validation.items()}
        check_columns(splits, {f"{self.name} column {len(made_of.columns)}": "label"})
        encoded = {name: with_labels(split, name, made_of.label_names) for name, split in splits.items()}
        return {name: self.tokenized(split, made_of.columns) for name, split in encoded.items()}, made_of.task()

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage == "predict" and self._tests_are_validation and self._raw_inputs is None:
            notice("The test split has no labels; predictions are for the validation split, in its place.")

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Texts; of pairs, the two parted by a tab."""
        columns = GLUE_TASKS[str(self.name)].columns
        return self.tokenized(parted_texts(inputs, columns), columns)


def hub_source(name: str) -> DatasetSource:
    """The splits of a GLUE task on the hub."""
    if name == "mnli":
        more = {"validation_mismatched": "validation_mismatched"}
        return DatasetSource(HUB, name, validation="validation_matched", test="test_matched", more=more)
    return DatasetSource(HUB, name)


def is_unlabelled(split: Dataset) -> bool:
    """Whether a split has rows, and no label for any of them."""
    if "label" not in split.column_names:
        return True
    return len(split) > 0 and all(plain_name(label) in UNLABELLED for label in split["label"])


def with_labels(split: Dataset, name: str, label_names: tuple[str, ...]) -> Dataset:
    """Replace the column ``label`` by ``labels``: indices into ``label_names``, or numbers if there are none.

    Args:
        split: A dataset whose column ``label`` holds indices, names or numbers.
        name: The split's name, for errors.
        label_names: Classes by index; none for a number.

    Raises:
        ConfigError: If a label is neither an index nor a name.
    """
    index = {value: i for i, label in enumerate(label_names) for value in (i, str(i), label)}
    feature, found = split.features["label"], split["label"]
    if label_names and isinstance(feature, ClassLabel):  # whose order may be another
        found = [label if label is None or label < 0 else feature.names[label] for label in found]
    labels = []
    for label in found:
        try:
            key = plain_name(label) if isinstance(label, str) else label
            labels.append(index[key] if label_names else _finite(label))
        except (KeyError, TypeError, ValueError):
            allowed = f"0 to {len(label_names) - 1}, or {', '.join(label_names)}" if label_names else "numbers"
            raise ConfigError(f"label={label!r} in the {name} split: allowed are {allowed}") from None
    return with_column(split, "label", labels)


def _finite(label: Any) -> float:
    number = float(label)
    if not math.isfinite(number):
        raise ValueError
    return number
