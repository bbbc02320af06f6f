"""Answers of SQuAD's layouts are read as one; what is no answer, or stands elsewhere, is told."""

import contextlib
import json

import pytest
from datasets import Dataset
from squad_files import LENGTHS, question

from d2dmoe_pl.data import SQuAD
from d2dmoe_pl.data.dataset_source import DatasetSource
from d2dmoe_pl.data.squad.given_answers import with_answers
from d2dmoe_pl.errors import ConfigError

CONTEXT = "The cat sat"
LISTS = {"text": ["Cat"], "answer_start": [4]}
NONE = {"text": [], "answer_start": []}


def split_of(*answers):
    return Dataset.from_dict({"context": [CONTEXT] * len(answers), "answers": list(answers)})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (LISTS, LISTS),
        (NONE, NONE),
        (None, NONE),
        ([{"text": "Cat", "answer_start": 4}], LISTS),
        ([], NONE),
        ({"text": [""], "answer_start": [-1]}, NONE),
        ({"text": [" ", "Cat"], "answer_start": [0, 4]}, LISTS),
        (json.dumps(LISTS), LISTS),  # as in CSV files
        (str(LISTS), LISTS),
        (str([{"text": "Cat", "answer_start": 4}]), LISTS),
        ("{'text': array(['Cat'], dtype=object), 'answer_start': array([4], dtype=int32)}", LISTS),  # by pandas
        ("{'text': array([], dtype=object), 'answer_start': array([], dtype=int32)}", NONE),
        ("  ", NONE),
    ],
)
def test_layouts(given, read):
    assert with_answers(split_of(given), "train")["answers"][:] == [read]


@pytest.mark.parametrize(
    ("flag", "is_refused"), [(True, True), (False, False), (None, False), ("true", True), (0, False)]
)
def test_a_question_that_has_no_answer_has_none(flag, is_refused):
    split = split_of(LISTS).add_column("is_impossible", [flag])
    with pytest.raises(ConfigError) if is_refused else contextlib.nullcontext() as error:
        with_answers(split, "train")
    if is_refused:
        said = f"is_impossible: sample 1 of the train split has {flag!r}, and the answer 'Cat'; must be false, or "
        assert str(error.value) == f"{said}have none"
    assert with_answers(split_of(NONE).add_column("is_impossible", [flag]), "train")["answers"][:] == [NONE]


@pytest.mark.parametrize(
    "given",
    [
        "cat",
        "4",
        "{'text': ['Cat'], 'answer_start': open('x')}",
        {"text": "cat", "answer_start": 4},
        {"text": ["cat"]},
        {"text": ["cat"], "answer_start": []},
        [{"text": "cat"}],
        ["cat"],
    ],
)
def test_other_forms(given):
    message = r"^answers: sample 1 of the train split has .*; must be two lists of one length, text and answer_start$"
    with pytest.raises(ConfigError, match=message):
        with_answers(split_of(given), "train")


@pytest.mark.parametrize(("start", "there"), [(0, "The"), (5, "at "), (-1, ""), (99, "")])
def test_places_of_something_else(start, there):
    where = f"sample 1 of the train split has 'cat' at answer_start={start}"
    with pytest.raises(ConfigError, match=f"^answers: {where}, where its context has '{there}'; must be counted"):
        with_answers(split_of({"text": ["cat"], "answer_start": [start]}), "train")


@pytest.mark.parametrize("column", ["context", "question"])
@pytest.mark.parametrize(("value", "what"), [(None, "no text"), (3, "3; must be a text")])
def test_texts_that_are_missing(column, value, what, tmp_path, tokenizer_path):
    rows = [{**question(i), **({column: value} if (value is None and i < 1) or value == 3 else {})} for i in range(3)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SQuAD(
        tokenizer_path, 1, DatasetSource(**dict.fromkeys(("train", "validation", "test"), str(file))), **LENGTHS
    )
    with pytest.raises(ConfigError, match=f"^column='{column}': .* has {what}$"):
        data.setup()
