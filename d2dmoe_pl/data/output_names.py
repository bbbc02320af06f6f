"""Which output of a model is which class, by name."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.errors import check

WHOLE = re.compile(r"[+-]?\d+\.0+")
PLACEHOLDER = re.compile(r"LABEL_\d+")


def places(data_names: Sequence[str], output_names: Sequence[str]) -> list[int] | None:
    """Which output of a model each class of the data is, by name.

    Names agree if they are the same but for case, blanks, hyphens and underscores, where that leaves all of them
    different. Classes that are called by numbers from 0 are outputs by number, unless outputs are called by numbers; if
    there is no 0, they may as well be counted from 1, and only tell outputs without names.

    Args:
        data_names: Names of the data's classes.
        output_names: Names of the model's outputs by index; placeholders such as ``LABEL_0`` tell nothing.

    Returns:
        An index into ``output_names`` for each of ``data_names``; None if one of them is no output.

    Example:
        >>> from d2dmoe_pl.data.output_names import places
        >>> places(["neg", "pos"], ["Pos", "neutral", "Neg"])
        [2, 0]
        >>> places(["0", "1"], ["LABEL_0", "LABEL_1"])
        [0, 1]
        >>> places(["neg", "pos"], ["LABEL_0", "LABEL_1"]) is None
        True
    """
    for spelling in (plain_name, _loose):
        index = {spelling(name): i for i, name in enumerate(output_names)}
        keys = [spelling(name) for name in data_names]
        if len(index) == len(output_names) and len(set(keys)) == len(keys) and all(key in index for key in keys):
            return [index[key] for key in keys]
    if any(plain_name(name).isdecimal() for name in output_names):
        return None
    plain = map(plain_name, data_names)
    numbers = [int(name) if name.isdecimal() else len(output_names) for name in plain]
    is_told = are_placeholders(output_names) or 0 in numbers
    return numbers if is_told and all(number < len(output_names) for number in numbers) else None


def placeholders(number: int) -> list[str]:
    """What outputs are called that nobody gave names."""
    return [f"LABEL_{index}" for index in range(number)]


def are_placeholders(output_names: Sequence[str]) -> bool:
    """Whether these are the names that outputs have where nobody gave them any."""
    return all(PLACEHOLDER.fullmatch(name) for name in output_names)


def plain_name(label: Any) -> str:
    """A label's name, without the blanks around it; of a whole number that was written as ``1.0``, ``1``."""
    name = str(label).strip()
    return name.partition(".")[0] if WHOLE.fullmatch(name) else name


def named_label(label: Any, names: Sequence[str] | None, where: str) -> str:
    """The name of a label in a list.

    Args:
        label: A name or number.
        names: Of the numbers, where they are those of a ``ClassLabel``.
        where: The column and sample, for errors.

    Raises:
        ConfigError: For a label that is missing, or a number that stands for none: below 0, or without a name; and for
            what is neither a name nor a whole number.
    """
    known = names is None or (isinstance(label, int) and 0 <= label < len(names))
    is_missing = label is None or (isinstance(label, int | float) and not label >= 0)  # NaN is one of these
    check(known and not is_missing, f"{where} has the label {label!r}, which is none; must be there for each")
    is_one = isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())
    check(is_one, f"{where} has the label {label!r}; must be one name or whole number")
    return plain_name(label if names is None else names[label])


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", plain_name(name)).casefold()


def renumbered(labels: Tensor, outputs: Tensor) -> Tensor:
    """Labels by the index of a model's output.

    Args:
        labels: Indices ``(B, ...)`` of the data's classes, negative where there is none; or probabilities ``(B, C)`` of
            these and, behind them, of the outputs that the data has no class for.
        outputs: For each of the ``C``, the output's index.
    """
    if not labels.is_floating_point():
        return torch.where(labels < 0, labels, outputs[labels.clamp(min=0)])
    probabilities = labels.new_zeros(len(labels), len(outputs))
    probabilities[:, outputs[: labels.shape[1]]] = labels
    return probabilities
