"""The labels of several splits, by name."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from d2dmoe_pl.data.output_names import plain_name
from d2dmoe_pl.data.sample_names import sample_names
from d2dmoe_pl.errors import check, some_of

# more classes than this, and more than half as many as samples, are no classes
MANY = 20


def encode_labels(splits: Mapping[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """Replace the label column, of strings, whole numbers or ``ClassLabel``, by ``labels``, indices from 0.

    A label is its name: numbers of a ``ClassLabel`` are read with the names of their own split, and blanks around a
    name are no part of it.

    Args:
        splits: Datasets by split name, ``train`` among them; classes are those of the training split, in the order of
            its ``ClassLabel``, else sorted, as numbers where all are.
        column: Name of the label column.

    Returns:
        The splits, and the classes' names by index.

    Raises:
        ConfigError: If a label is missing or no name, the training split has one class or hardly two samples a class,
            or another split has a label that the training split has not.
    """
    labels = {name: label_names(split, column, name) for name, split in splits.items()}
    feature = splits["train"].features[column]
    given = (
        [plain_name(name) for name in feature.names]
        if isinstance(feature, ClassLabel)
        else _sorted(set(labels["train"]))
    )
    names = list(dict.fromkeys(given))
    check(
        len(names) <= max(MANY, len(labels["train"]) // 2),
        f"label_column={column!r}: has {len(names)} different values in {len(labels['train'])} samples of the train "
        "split, which are no classes; for numbers there is TextRegression with the task text-regression, for answers "
        "TextToText with text-to-text",
    )
    there = list(dict.fromkeys(labels["train"]))
    check(len(there) > 1, f"label_column={column!r}: has one class only, {there[0]}; must have two at least")
    index = {name: i for i, name in enumerate(names)}
    encoded = {}
    for name, split in splits.items():
        unseen = sorted({label for label in labels[name] if label not in index})
        check(
            not unseen,
            f"{column}: the {name} split has labels unseen in training: {some_of(unseen, 5)}; "
            f"allowed are {some_of(names)}",
        )
        encoded[name] = with_column(split, column, [index[label] for label in labels[name]])
    return encoded, names


def as_number(value: Any) -> float:
    """The number that a value is, or says; not a number if it is none, as ``3_456`` to all but Python."""
    try:
        return math.nan if "_" in str(value) else float(value)
    except (TypeError, ValueError):
        return math.nan


def encode_numbers(splits: Mapping[str, Dataset], column: str) -> dict[str, Dataset]:
    """Replace a column of numbers by ``labels``, floating-point.

    Raises:
        ConfigError: If a value is no finite number, or one that float32 has not; or if all of a split are the same.
    """
    encoded = {}
    largest = torch.finfo(torch.float32).max
    for name, split in splits.items():
        numbers = []
        for sample, value in zip(sample_names(split, name), split[column], strict=True):
            number = as_number(value)
            check(
                math.isfinite(number),
                f"label_column={column!r}: {value!r} in {sample} is no number; must be finite",
            )
            check(
                abs(number) <= largest,
                f"label_column={column!r}: {value!r} in {sample} is too large; must be at most {largest:g}",
            )
            numbers.append(number)
        encoded[name] = with_column(split, column, numbers)
    for name, split in encoded.items():  # nothing is learnt from one number, and nothing correlates with it
        found = set(split["labels"])
        only = ", ".join(f"{number:g}" for number in found)
        check(len(found) != 1, f"label_column={column!r}: all numbers of the {name} split are {only}; must differ")
    return encoded


def label_names(split: Dataset, column: str, split_name: str) -> list[str]:
    """The names of the labels of a split, one a sample.

    Args:
        split: A dataset with the column.
        column: Of strings, whole numbers, truth values or ``ClassLabel``.
        split_name: For errors.

    Raises:
        ConfigError: If a label is missing, a list, or a number with a fractional part.
    """
    feature = split.features[column]
    names = [plain_name(name) for name in feature.names] if isinstance(feature, ClassLabel) else None
    found = []
    samples = sample_names(split, split_name)
    for sample, label in zip(samples, split[column], strict=True):
        where = f"label_column={column!r}: {sample} has"
        if isinstance(label, float) and not isinstance(label, bool):
            check(not math.isnan(label), f"{where} no label")
            check(
                label.is_integer(),
                f"{where} {label}, a number with a fractional part, which is no class; for numbers there is "
                "TextRegression with the task text-regression",
            )
            label = int(label)
        check(isinstance(label, str | Number | None), f"{where} {label!r}; must be one name or whole number")
        if names is not None and label is not None:
            check(0 <= label < len(names), f"{where} the number {label}, which is none of its {len(names)} classes")
            label = names[label]
        check(label is not None and str(label).strip() != "", f"{where} no label")
        found.append(plain_name(label))
    _check_whole(found, column, samples)
    return found


def with_column(split: Dataset, column: str, labels: Sequence[Any]) -> Dataset:
    """The split with ``labels`` in the place of the column ``column``, and of one that has that name already."""
    others = [name for name in split.column_names if name not in (column, "labels")]
    if not others:  # a dataset without columns has no rows to put labels to
        return Dataset.from_dict({"labels": list(labels)})
    return split.select_columns(others).add_column("labels", list(labels))


def _sorted(names: set[str]) -> list[str]:
    """In the order of numbers, if all are, else of letters."""
    are_numbers = all(re.fullmatch(r"[+-]?\d+", name) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers else sorted(names)  # 7 and 007 are two


def _check_whole(names: Sequence[str], column: str, samples: Sequence[str]) -> None:
    """Refuse labels that are all numbers, written out, of which some have a fractional part."""
    numbers = []
    for name in names:
        try:
            numbers.append(float(name))
        except ValueError:
            return
    for sample, name, number in zip(samples, names, numbers, strict=True):
        check(
            number.is_integer() or not math.isfinite(number),  # which is a name
            f"label_column={column!r}: {sample} has {name}, a number with a fractional part, which is no class; for "
            "numbers there is TextRegression with the task text-regression",
        )
