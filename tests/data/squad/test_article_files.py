"""Files as SQuAD's authors publish them have a row for each question."""

import json

import pytest
from squad_files import question

from d2dmoe_pl.data import DatasetSource
from d2dmoe_pl.data.squad.given_answers import with_answers
from d2dmoe_pl.errors import ConfigError


def article(numbers, version):
    """An article with a paragraph for each question; of version 2, some have no answer, but one that seems so."""
    paragraphs = []
    for number in numbers:
        row = question(number)
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        asked = {"id": row["id"], "question": row["question"], "answers": answers}
        paragraphs.append({"context": row["context"], "qas": [asked]})
        if version == 2:
            none = {"answers": [], "plausible_answers": answers, "is_impossible": True}
            paragraphs[-1]["qas"] = [{**asked, "is_impossible": False}, {**asked, "id": "none", **none}]
    return {"title": str(numbers), "paragraphs": paragraphs}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["whole", "list", "lines"])
def test_a_row_a_question(tmp_path, version, layout):
    articles = [article(numbers, version) for numbers in ([0, 1, 2], [3, 4, 5])]
    texts = {
        "whole": json.dumps({"data": articles, "version": "1.1"}),
        "list": json.dumps(articles, indent=1),
        "lines": "\n".join(map(json.dumps, articles)),
    }
    file = tmp_path / "train.json"
    file.write_text(texts[layout])
    split = DatasetSource(train=str(file), validation=str(file), test=str(file)).load()["test"]
    rows = list(with_answers(split, "test"))
    answered = [row for row in rows if row["id"] != "none"]
    columns = ("id", "context", "question", "answers")
    asked = [{column: question(number)[column] for column in columns} for number in range(6)]
    assert [{column: row[column] for column in columns} for row in answered] == asked
    assert {row["is_impossible"] for row in rows if row["id"] == "none"} <= {True}
    assert [row["answers"]["text"] for row in rows if row["id"] == "none"] == [[]] * 6 * (version == 2)
    assert len(split) == 6 * version
    several = DatasetSource(train=str(tmp_path / "*.json"), validation=str(file), test=str(file))
    (tmp_path / "more.json").write_text(texts[layout])
    assert len(several.load()["train"]) == 12 * version


@pytest.mark.parametrize("answers", ["cat", ["cat"], [{"text": "cat"}]])
def test_answers_of_another_form(tmp_path, answers):
    given = article([0, 1], 1)
    given["paragraphs"][0]["qas"] = []  # which may be
    given["paragraphs"][1]["qas"][0]["answers"] = answers
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"data": [given, {"title": "of nothing"}]}))
    split = DatasetSource(train=str(file), validation=str(file), test=str(file)).load()["train"]
    with pytest.raises(ConfigError, match=r"^answers: sample 1 of the train split has .*; must be two lists of one"):
        with_answers(split, "train")


def test_other_lists_of_records_stay(tmp_path):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"paragraphs": [{"text": "a"}], "label": 0}, {"paragraphs": [], "label": 1}]))
    split = DatasetSource(train=str(file), validation=str(file), test=str(file)).load()["train"]
    assert split.column_names == ["paragraphs", "label"]
