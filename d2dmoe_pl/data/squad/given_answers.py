"""The answers that a file in the manner of SQuAD gives, in one form, and whether they stand where it says."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from d2dmoe_pl.data.listed_values import written
from d2dmoe_pl.data.sample_names import sample_names
from d2dmoe_pl.errors import check

PARTS = ("text", "answer_start")


def with_answers(split: Dataset, split_name: str) -> Dataset:
    """A split whose ``answers`` are lists of texts and of where they start, as they are on the hub.

    Args:
        split: With ``answers`` so, or as in the files of SQuAD's authors, a list of an answer each, or a text that
            Python or JSON wrote of either; None for no answer, as is an answer of blanks.
        split_name: For errors.

    Raises:
        ConfigError: For answers of another form, or one that does not stand in its context where it is said to, or
            that a question has which ``is_impossible`` says has none.
    """
    given = split["answers"]
    found = []
    flags = split["is_impossible"] if "is_impossible" in split.column_names else [None] * len(split)
    rows = zip(sample_names(split, split_name), given, split["context"], flags, strict=True)
    for sample, value, context, impossible in rows:
        answers = _in_lists(value)
        check(
            answers is not None,
            f"answers: {sample} has {str(value)[:80]}; must be two lists of one length, text and answer_start",
        )
        assert answers is not None
        for text, start in zip(answers["text"][:1], answers["answer_start"][:1], strict=True):  # what is learnt
            check(
                str(impossible).strip().casefold() not in ("true", "1", "1.0"),
                f"is_impossible: {sample} has {impossible!r}, and the answer {text!r}; must be false, or have none",
            )
            there = context[start : start + len(text)] if start >= 0 else ""
            check(
                there.casefold() == text.casefold(),
                f"answers: {sample} has {text!r} at answer_start={start}, where its context has {there!r}; must be "
                "counted in characters from 0",
            )
        found.append(answers)
    if found == list(given):
        return split
    return split.remove_columns("answers").add_column("answers", found)


def _in_lists(value: Any) -> dict[str, list] | None:
    """Answers as lists; None if they are of no known form."""
    if isinstance(value, str):  # as in a CSV file
        value = written(value) if value.strip() else []
        if value is None:
            return None
    if value is None:
        value = []
    if isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
        value = {part: [answer.get(part) for answer in value] for part in PARTS}
    if not isinstance(value, Mapping):
        return None
    texts, starts = (value.get(part) for part in PARTS)
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
        return None
    is_told = all(isinstance(text, str) for text in texts) and all(isinstance(start, int) for start in starts)
    kept = [index for index, text in enumerate(texts) if is_told and text.strip()]
    return {"text": [texts[i] for i in kept], "answer_start": [starts[i] for i in kept]} if is_told else None
