"""Files and folders of any usual make become a recipe's data; what cannot be told is asked for."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import squad_files
import stand_ins
import tiny
import transformers

from d2dmoe_pl.compression.own_data import data_config, source_of
from d2dmoe_pl.data import DatasetSource, SQuAD
from d2dmoe_pl.errors import ConfigError

NONE = {"text_columns": None, "label_column": None, "image_column": None, "audio_column": None}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path / "tokenizer", stand_ins.WORDS)


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def rows_of(*columns, size=30):
    return [{column: f"{column} cat {i % 3}" for column in columns} for i in range(size)]


def config(data, tokenizer=None, task=None, model=None, picture=(), **columns):
    return data_config(data, task, model, tokenizer, {**NONE, **columns}, dict(picture), 8)


def test_a_file(tmp_path, tokenizer):
    made, task = config(write(tmp_path / "all.csv", rows_of("text", "label")), tokenizer)
    assert task == "text-classification"
    assert made["class_path"] == "TextClassification"
    arguments = made["init_args"]
    assert arguments["source"] == {"train": str(tmp_path / "all.csv"), "validation": None, "test": None}
    assert (arguments["text_columns"], arguments["label_column"]) == (["text"], "label")
    assert arguments["max_length"] == 8


@pytest.mark.parametrize(("make", "kept"), [(transformers.BertConfig, 16), (transformers.RobertaConfig, 14)])
def test_texts_are_no_longer_than_the_model_has_positions(tmp_path, tokenizer, make, kept):
    """Whatever the tokenizer says, which says nothing."""
    make(vocab_size=40, max_position_embeddings=16, pad_token_id=1, **tiny.SHAPE).save_pretrained(tmp_path / "model")
    long = [{"text": "cat " * 30, "label": row % 2} for row in range(20)]
    made = config(write(tmp_path / "long.csv", long), tokenizer, model=str(tmp_path / "model"))[0]
    assert made["init_args"]["max_length"] == kept
    blocks = config(write(tmp_path / "lm.csv", long), tokenizer, "causal-language-modeling", str(tmp_path / "model"))[0]
    assert blocks["init_args"]["length"] == kept


def test_a_file_beside_is_no_split_of_a_name(tmp_path):
    write(tmp_path / "train.csv", rows_of("text", "label"))
    assert source_of("train.csv")["train"] == "train.csv"


def test_a_folder_and_what_is_held_out_of_it(tmp_path):
    write(tmp_path / "data" / "train.csv", rows_of("text", "label"))
    assert source_of("data") == {"dataset": "data", "validation": None, "test": None}
    write(tmp_path / "data" / "test.csv", rows_of("text", "label"))
    assert source_of("data") == {"dataset": "data", "validation": None}


def test_columns_by_other_names(tmp_path, tokenizer):
    pairs = write(tmp_path / "pairs.csv", rows_of("id", "premise", "hypothesis", "label"))
    assert config(pairs, tokenizer)[0]["init_args"]["text_columns"] == ["premise", "hypothesis"]
    reviews = write(tmp_path / "reviews.csv", rows_of("review", "sentiment"))
    arguments = config(reviews, tokenizer)[0]["init_args"]
    assert (arguments["text_columns"], arguments["label_column"]) == (["review"], "sentiment")
    reviews = write(tmp_path / "capital.csv", rows_of("Id", "Title", "Sentiment"))
    arguments = config(reviews, tokenizer)[0]["init_args"]
    assert (arguments["text_columns"], arguments["label_column"]) == (["Title"], "Sentiment")
    odd = write(tmp_path / "odd.csv", rows_of("a", "b", "c"))
    arguments = config(odd, tokenizer, "text-classification", text_columns=["c"], label_column="a")[0]["init_args"]
    assert (arguments["text_columns"], arguments["label_column"]) == (["c"], "a")
    one = config(odd, tokenizer, "text-classification", text_columns="c", label_column="a")[0]["init_args"]
    assert one["text_columns"] == ["c"]
    worded = write(tmp_path / "worded.csv", [{"a": "x", "b": f"{n}", "c": "some words"} for n in range(9)])
    assert config(worded, tokenizer, "text-classification", label_column="a")[0]["init_args"]["text_columns"] == ["c"]
    with pytest.raises(ConfigError) as error:
        config(odd, tokenizer, "text-classification")
    assert str(error.value) == "label_column=None: none of a, b, c has a name that tells; say which"
    with pytest.raises(ConfigError) as error:
        config(odd, tokenizer, "text-classification", label_column="a")
    assert str(error.value) == "text_columns=None: none of b, c has a name that tells; say which"
    with pytest.raises(ConfigError) as error:
        config(odd, tokenizer, "text-classification", text_columns=["c", "d"], label_column="a")
    assert str(error.value) == f"text_columns='d': no such column in {odd}; there are a, b, c"


@pytest.mark.parametrize(
    ("task", "columns", "made", "settings"),
    [
        ("token-classification", ("tokens", "ner_tags"), "TokenClassification", ("words_column", "labels_column")),
        ("text-to-text", ("article", "summary"), "TextToText", ("source_column", "target_column")),
        ("multi-label-classification", ("text", "labels"), "TextMultiLabel", ("text_columns", "label_columns")),
    ],
)
def test_other_tasks_of_texts(tmp_path, tokenizer, task, columns, made, settings):
    found, said = config(write(tmp_path / "own.csv", rows_of(*columns)), tokenizer, task)
    assert (found["class_path"], said) == (made, task)
    values = [found["init_args"][name] for name in settings]
    assert [value[0] if isinstance(value, list) else value for value in values] == list(columns)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("token-classification", lambda n: {"tokens": ["a", "cat"], "ner_tags": ["O", "PET"]}),
        ("multi-label-classification", lambda n: {"text": "a cat", "labels": ["pet", "cat"][: n % 3]}),
        ("token-classification", lambda n: {"tokens": "['a', 'cat']", "ner_tags": "['O', 'PET']"}),
        ("token-classification", lambda n: {"text": "a cat " * (n + 1), "tags": "O PET " * (n + 1)}),
        ("token-classification", lambda n: {"text": "a cat " * (n % 5 + 1), "tags": "O PET " * (n % 5 + 1)}),
        ("multi-label-classification", lambda n: {"text": "a cat", "labels": str(["pet", "cat"][: n % 3])}),
        ("multi-label-classification", lambda n: {"text": "a cat", "labels": "[0, 1]"}),
        ("text-classification", lambda n: {"text": "a cat", "label": ["[some]", "no"][n % 2]}),
        ("text-regression", lambda n: {"text": "a cat", "label": n / 7}),
        ("text-regression", lambda n: {"text": "a cat", "score": str(n / 7)}),
        ("text-regression", lambda n: {"text": "a cat", "score": str(n / 7) if n % 4 else "nan"}),
        ("text-regression", lambda n: {"text": "a cat", "score": f"{n / 7}".replace(".", ",")}),
        ("text-regression", lambda n: {"text": "a cat", "score": f"{n / 7}%"}),
        ("text-classification", lambda n: {"text": "a cat", "label": f"{n % 2},{n % 3}"}),
        ("text-to-text", lambda n: {"article": "a cat", "summary": f"cat number {n}"}),
        ("text-classification", lambda n: {"text": "a cat", "label": float(n % 3)}),
        ("text-classification", lambda n: {"text": "a cat", "label": ["nan", "inf"][n % 2]}),
        ("text-classification", lambda n: {"text": "a cat", "label": ["1.5", "two"][n % 2]}),
        ("text-classification", lambda n: {"text": "a cat", "label": ["very good", "very bad"][n % 2]}),
        ("text-classification", lambda n: {"text": "a cat", "label": [None, "pet", "cat"][n % 3]}),
    ],
)
def test_the_task_is_told_by_the_labels(tmp_path, tokenizer, task, row):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row(n)) + "\n" for n in range(30)))
    assert config(str(file), tokenizer)[1] == task
    assert config(str(file), tokenizer, "text-classification")[1] == "text-classification"


def test_whole_numbers_are_learnt_as_such_by_a_model_with_one_output(tmp_path, tokenizer):
    file = write(tmp_path / "own.csv", [{"text": "a cat", "score": n % 5} for n in range(30)])
    for outputs, task in ((1, "text-regression"), (5, "text-classification")):
        transformers.BertConfig(num_labels=outputs).save_pretrained(tmp_path / "model")
        assert config(file, tokenizer, model=str(tmp_path / "model"))[1] == task


def test_long_texts_are_no_warning(tmp_path, caplog, capfd):
    made = transformers.AutoTokenizer.from_pretrained(tiny.tokenizer(tmp_path / "short", stand_ins.WORDS))
    made.model_max_length = 16
    made.save_pretrained(tmp_path / "short")
    file = write(tmp_path / "own.csv", [{"text": "cat " * 40, "label": f"{n % 2}"} for n in range(30)])
    assert config(file, str(tmp_path / "short"))[0]["init_args"]["max_length"] == 16
    assert "longer than" not in caplog.text + capfd.readouterr().err


def test_long_answers_are_not_cut(tmp_path, tokenizer):
    rows = [{"text": "a cat", "summary": "cat dog " * 20} for _ in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = config(str(tmp_path / "own.jsonl"), tokenizer, "text-to-text")
    assert found["init_args"]["max_target_length"] >= 40


def test_a_file_may_be_compressed(tmp_path, tokenizer):
    plain = Path(write(tmp_path / "own.csv", rows_of("text", "label")))
    with gzip.open(f"{plain}.gz", "wb") as packed:
        packed.write(plain.read_bytes())
    made, task = config(f"{plain}.gz", tokenizer)
    assert (task, made["init_args"]["source"]["train"]) == ("text-classification", f"{plain}.gz")


def test_texts_for_vectors(tmp_path, tokenizer):
    tiny.bert_config().save_pretrained(tokenizer)
    found, _ = config(write(tmp_path / "own.csv", rows_of("text")), task="embeddings", model=tokenizer)
    assert found["class_path"] == "TextEmbeddings"
    assert (found["init_args"]["model"], found["init_args"]["text_column"]) == (tokenizer, "text")


def test_text_alone_is_for_a_language_model(tmp_path, tokenizer):
    (tmp_path / "all.txt").write_text("cat dog\n\neel fox\n\n" * 30)
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "writer")
    made, task = config(str(tmp_path / "all.txt"), tokenizer, model=str(tmp_path / "writer"))
    assert (task, made["class_path"], made["init_args"]["text_column"]) == (
        "causal-language-modeling",
        "LanguageModeling",
        "text",
    )


def test_text_alone_is_for_a_model_of_gguf(tmp_path):
    """Such a file names no class of transformers."""
    gguf_files = pytest.importorskip("gguf_files", reason="gguf is not installed", exc_type=ImportError)
    (tmp_path / "all.txt").write_text("the the\n\nthe\n\n" * 30)
    file = str(gguf_files.write_gguf(gguf_files.llama(), tmp_path / "tiny.gguf"))
    made, task = config(str(tmp_path / "all.txt"), None, model=file)
    assert (task, made["init_args"]["tokenizer"]) == ("causal-language-modeling", file)


def test_text_alone_is_not_for_a_model_that_writes_none(tmp_path, tokenizer):
    (tmp_path / "all.csv").write_text("a cat,pet\n" * 30)  # a header is missing
    for architectures in (["BertForSequenceClassification"], ["BertForMaskedLM"], None):
        transformers.BertConfig(architectures=architectures).save_pretrained(tmp_path / "model")
        with pytest.raises(ConfigError) as error:
            config(str(tmp_path / "all.csv"), tokenizer, model=str(tmp_path / "model"))
        assert str(error.value).startswith(
            "label_column=None: none of a cat, pet has a name that tells; say which, or set task (causal-language"
        )


def test_text_alone_may_be_masked(tmp_path, tokenizer):
    made, task = config(write(tmp_path / "all.csv", rows_of("text")), tokenizer, "masked-language-modeling")
    assert (task, made["class_path"], made["init_args"]["objective"]) == (
        "masked-language-modeling",
        "LanguageModeling",
        "masked",
    )


@pytest.mark.parametrize("answerless", [False, True])
def test_questions_with_texts_that_answer_them(tmp_path, answerless):
    file = squad_files.write(tmp_path / "asked", lambda i: answerless and i % 4 == 1).train
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", squad_files.WORDS, squad_files.SPECIAL)
    made, task = config(file, tokenizer)
    assert (task, made["class_path"], made["init_args"]["version"]) == ("question-answering", "SQuAD", 1 + answerless)
    arguments = {**made["init_args"], "source": DatasetSource(**made["init_args"]["source"])}
    data = SQuAD(**arguments)
    data.setup()
    assert data.num_training_samples == 24  # of 30, and three held out for each split
    with pytest.raises(ConfigError, match="task='question-answering': context, question, answers must be col"):
        config(write(tmp_path / "all.csv", rows_of("text", "label")), tokenizer, "question-answering")


def test_questions_without_a_text_are_told(tmp_path, tokenizer):
    rows = [{**squad_files.question(i), "context": None if i == 4 else "a red cat"} for i in range(30)]
    rows = [{**row, "answers": squad_files.no_answer()} for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="column='context': sample 5 of the train split"):
        config(str(tmp_path / "asked.jsonl"), tokenizer)


def test_numbers(tmp_path, tokenizer):
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps({"text": "cat", "label": i / 7}) + "\n" for i in range(20)))
    assert config(str(file), tokenizer, "text-regression")[0]["class_path"] == "TextRegression"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("./not/there.csv", "data='./not/there.csv': no such file or folder"),
        ("readme.md", "data='readme.md': the ending must be one of"),
        ("empty", "data='empty': no file, no folder, and no dataset that can be loaded"),
    ],
)
def test_what_is_no_data(tmp_path, data, message):
    (tmp_path / "readme.md").write_text("no rows")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        source_of(data)
    assert str(error.value).startswith(message)


def test_an_unknown_task(tmp_path, tokenizer):
    file = write(tmp_path / "all.csv", rows_of("text", "label"))
    with pytest.raises(ConfigError, match="task='translation': allowed are text-classification, text-regression"):
        config(file, tokenizer, "translation")
    with pytest.raises(ConfigError, match="tokenizer=None: must be the folder or hub name"):
        config(file)
