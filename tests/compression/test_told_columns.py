"""A column that is given is read as what it is given for, or refused; none is passed over."""

import json

import pytest
import stand_ins
import tiny
import transformers

from d2dmoe_pl.compression.own_data import data_config
from d2dmoe_pl.errors import ConfigError

NONE = {"text_columns": None, "label_column": None, "image_column": None, "audio_column": None}


@pytest.fixture
def read(tmp_path):
    """What is read of a file with columns of words, of which none stands for a label a word."""
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", stand_ins.WORDS)

    def made(columns, task=None, model=None, **given):
        rows = [{name: f"{name} cat {i}" + " cat" * ((i + len(name)) % 3) for name in columns} for i in range(30)]
        (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return data_config(str(tmp_path / "all.jsonl"), task, model, tokenizer, {**NONE, **given}, {}, 8)

    return made


@pytest.mark.parametrize(
    ("given", "source", "target"),
    [
        ({}, "text", "answer"),
        ({"text_columns": "answer"}, "answer", "text"),
        ({"text_columns": ["text"]}, "text", "answer"),
        ({"label_column": "text"}, "answer", "text"),
    ],
)
def test_a_column_of_texts_is_not_that_of_labels_too(read, given, source, target):
    for task in (None, "text-to-text") if given != {"text_columns": "answer"} else ("text-to-text",):
        arguments = read(("text", "answer"), task, **given)[0]["init_args"]
        assert (arguments["source_column"], arguments["target_column"]) == (source, target)


def test_a_name_of_labels_may_be_that_of_texts(read, tmp_path):
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "model")
    made, task = read(("summary",), model=str(tmp_path / "model"), text_columns="summary")
    assert (task, made["init_args"]["text_column"]) == ("causal-language-modeling", "summary")


@pytest.mark.parametrize(
    "pair",
    [
        *(("question", "sentence"), ("query", "document"), ("text", "text_pair"), ("text1", "text2")),
        *(("sentence_a", "sentence_b"), ("question", "passage"), ("query", "passage"), ("premise", "hypothesis")),
    ],
)
def test_pairs_are_read_as_such(read, pair, capsys):
    made, task = read((*pair, "label"), "text-classification")
    assert (task, made["init_args"]["text_columns"]) == ("text-classification", list(pair))
    assert "is not; --text_columns" not in capsys.readouterr().err


def test_which_of_two_texts_is_read_is_said(read, capsys):
    made, _ = read(("title", "content", "label"), "text-classification")
    assert made["init_args"]["text_columns"] == ["content"]
    assert "Of the columns of texts, content is read, and title is not; --text_columns says" in capsys.readouterr().err
    read(("title", "content", "label"), "text-classification", text_columns=["content"])
    assert "is not; --text_columns" not in capsys.readouterr().err


LANGUAGE = "causal-language-modeling"


@pytest.mark.parametrize(
    ("columns", "task", "given", "said"),
    [
        (
            ("text", "answer", "context"),
            "text-to-text",
            {"text_columns": ["text", "context"]},
            "text_columns=['text', 'context']: text-to-text reads one column; must be one of text, context",
        ),
        (
            ("premise", "hypothesis", "answer"),
            "text-to-text",
            {},
            "text_columns=None: text-to-text reads one column; must be one of premise, hypothesis",
        ),
        (
            ("premise", "hypothesis"),
            LANGUAGE,
            {},
            f"text_columns=None: {LANGUAGE} reads one column; must be one of premise, hypothesis",
        ),
        (
            ("text", "answer"),
            "embeddings",
            {"text_columns": ["text", "answer"]},
            "text_columns=['text', 'answer']: embeddings reads one column; must be one of text, answer",
        ),
        (
            ("text", "answer"),
            None,
            {"text_columns": "text", "label_column": "text"},
            "label_column='text': is the column of what has the labels; must be another",
        ),
        (
            ("text",),
            "text-to-text",
            {"label_column": "text"},
            "label_column='text': is all that the data has; must have texts too",
        ),
        (
            ("text",),
            "text-to-text",
            {"text_columns": "text"},
            "text_columns=['text']: is all that the data has; must have labels too",
        ),
        (
            ("text", "answer"),
            LANGUAGE,
            {"label_column": "answer"},
            f"label_column='answer': {LANGUAGE} reads no such column; must be left out, or another task",
        ),
        (
            ("text", "answer"),
            "text-to-text",
            {"image_column": "answer"},
            "image_column='answer': text-to-text reads no such column; must be left out, or another task",
        ),
        (
            ("context", "question", "answers"),
            "question-answering",
            {"text_columns": "context"},
            "text_columns=['context']: question-answering reads no such column; must be left out, or another task",
        ),
    ],
)
def test_no_column_that_is_given_is_passed_over(read, columns, task, given, said):
    with pytest.raises(ConfigError) as error:
        read(columns, task, **given)
    assert str(error.value) == said


def test_texts_that_are_asked_for_are_read_where_there_are_pictures_too(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", stand_ins.WORDS)
    rows = [{"file": f"{i}.png", "text": "cat", "label": i % 2} for i in range(30)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {**NONE, "text_columns": "text"}
    _, task = data_config(str(tmp_path / "all.jsonl"), None, None, tokenizer, columns, {}, 8)
    assert task == "text-classification"
