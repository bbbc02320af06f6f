"""Files as the authors of SQuAD publish them: articles of paragraphs, each with its questions. In rows."""

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

LOOKED_AT = 100  # rows


def in_questions(split: Dataset) -> Dataset:
    """A row for each question of a split that holds articles, or objects with all of a file; any other as it is."""
    some = {name: split[:LOOKED_AT][name] for name in ("data", "paragraphs") if name in split.column_names}
    articles = [each for data in some.get("data", []) if isinstance(data, list) for each in data]
    if not _some_questions(some.get("paragraphs") or [_inner(each, "paragraphs") for each in articles]):
        return split
    return split.map(_questions, batched=True, remove_columns=split.column_names, desc="Reading questions")


def _some_questions(of_articles: list) -> bool:
    """Whether there are questions in the paragraphs of articles."""
    paragraphs = [one for each in of_articles if isinstance(each, list) for one in each]
    return any(isinstance(_inner(one, "qas"), list) for one in paragraphs)


def _inner(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, Mapping) else None


def _questions(rows: Mapping[str, list]) -> dict[str, list]:
    of_articles = rows.get("paragraphs") or [_inner(each, "paragraphs") for data in rows["data"] for each in data]
    made: dict[str, list] = {"id": [], "context": [], "question": [], "answers": [], "is_impossible": []}
    for paragraph in (paragraph for paragraphs in of_articles for paragraph in paragraphs or []):
        for question in _inner(paragraph, "qas") or []:
            for key in ("id", "question", "is_impossible"):
                made[key].append(_inner(question, key))
            made["context"].append(_inner(paragraph, "context"))
            made["answers"].append(json.dumps(_inner(question, "answers") or []))  # whatever they are, to be looked at
    return made
