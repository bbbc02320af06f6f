"""Files as the authors of SQuAD publish them: articles of paragraphs, each with its questions. In rows."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, List

PARTS = ("text", "answer_start")


def in_questions(split: Dataset) -> Dataset:
    """A row for each question of a split that holds articles, or one object with all of them; any other as it is."""
    features = split.features
    is_whole = _holds(features.get("data"), "paragraphs", "qas")
    if not is_whole and not _holds(features.get("paragraphs"), "qas"):
        return split
    return split.map(_questions, batched=True, remove_columns=split.column_names, desc="Reading questions")


def _holds(feature: Any, key: str, *inner: str) -> bool:
    """Whether values are lists of records with ``key``, which holds such lists in turn as ``inner`` says."""
    record = feature.feature if isinstance(feature, List) else None
    return isinstance(record, dict) and key in record and (not inner or _holds(record[key], *inner))


def _questions(rows: Mapping[str, list]) -> dict[str, list]:
    articles = rows.get("paragraphs") or [article["paragraphs"] for articles in rows["data"] for article in articles]
    made: dict[str, list] = {"id": [], "context": [], "question": [], "answers": []}
    for paragraph in (paragraph for paragraphs in articles for paragraph in paragraphs or []):
        for question in paragraph["qas"] or []:
            answers = question.get("answers") or []
            made["id"].append(question.get("id"))
            made["context"].append(paragraph.get("context"))
            made["question"].append(question.get("question"))
            made["answers"].append({part: [answer.get(part) for answer in answers] for part in PARTS})
    return made
