"""Every kind of text data tells of a tokenizer that does not know its texts, and of texts that are missing."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.data import (
    GLUE,
    DatasetSource,
    LanguageModeling,
    SQuAD,
    StreamedLanguageModeling,
    TextClassification,
    TextEmbeddings,
    TextToText,
    TokenClassification,
)
from d2dmoe_pl.data.embeddings.pooling import write_modules
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases._labels import build_for

WORDS = ["red", "green", "blue", "name", "the", "colour"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>")
NONE = (
    r"^tokenizer='.*': of the \d+ letters and digits looked at in the training split, none is in its tokens; must be a "
    "tokenizer for such texts, of the class that its folder says$"
)


def row(place, words=WORDS):
    """A row that every kind of data can read."""
    text = " ".join(words[(place + i) % len(words)] for i in range(4))
    return {
        "id": str(place),
        "text": text,
        "target": words[place % 2],
        "sentence": text,
        "question": text,
        "context": text,
        "answers": {"text": [text.split()[0]], "answer_start": [0]},
        "tokens": text.split(),
        "ner_tags": ["O", "B", "O", "O"],
        "label": place % 2,
    }


def write(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return DatasetSource(**dict.fromkeys(("train", "validation", "test"), str(folder / "rows.jsonl")))


def embeddings(source, tokenizer):
    torch.manual_seed(0)
    transformers.BertModel(tiny.bert_config()).save_pretrained(tokenizer)
    write_modules(Path(tokenizer), "mean", 24)
    return TextEmbeddings(source, tokenizer)


KINDS = {
    "classes": TextClassification,
    "glue": lambda source, tokenizer: GLUE("sst2", tokenizer, source),
    "questions": lambda source, tokenizer: SQuAD(tokenizer, 1, source, 32, 4, 8),
    "words": TokenClassification,
    "answers": TextToText,
    "vectors": embeddings,
    "blocks": lambda source, tokenizer: LanguageModeling(source, tokenizer, length=8),
    "streams": lambda source, tokenizer: StreamedLanguageModeling(source, tokenizer, 4, 4, length=8, batch_size=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_knows_no_word(kind, tmp_path):
    source = write(tmp_path, map(row, range(16)))
    with pytest.raises(ConfigError, match=NONE):
        KINDS[kind](source, tiny.tokenizer(tmp_path / "tokenizer", ["rot", "blau"], SPECIAL)).setup()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_knows(kind, tmp_path):
    source = write(tmp_path, map(row, range(16)))
    data = KINDS[kind](source, tiny.tokenizer(tmp_path / "known", WORDS, SPECIAL))
    data.setup()
    there, kept = data.letters
    assert there == kept > 10
    data = KINDS[kind](source, tiny.tokenizer(tmp_path / "some", WORDS[:3], SPECIAL))
    data.setup()
    assert data.letters[0] == there
    assert 0.2 < data.letters[1] / there < 0.9


def test_what_a_tokenizer_does_not_know_is_said_with_a_new_model(tmp_path, caplog):
    source = write(tmp_path, map(row, range(16)))
    data = TextClassification(source, tiny.tokenizer(tmp_path / "some", WORDS[:5], SPECIAL))
    data.setup()
    build_for(data, HuggingFaceModel("text-classification", config=tiny.bert_config()), makes_head=True)
    (said,) = [message for message in caplog.messages if "looked at" in message]
    there, kept = data.letters
    assert said == (
        f"tokenizer={str(tmp_path / 'some')!r}: of the {there} letters and digits looked at in the training split, "
        f"{kept} are in its tokens; it does not know the others, and no model can learn from them."
    )


def test_a_tokenizer_that_makes_nothing_of_texts(tmp_path):
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate("ACGT")}, []))  # what else there is, it drops
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path / "bases")
    data = LanguageModeling(write(tmp_path, map(row, range(16))), str(tmp_path / "bases"), length=8)
    with pytest.raises(ConfigError, match=NONE):
        data.setup()


def test_marks_and_blanks_are_no_letters(tmp_path):
    source = write(tmp_path, [{**row(i), "text": "..." if i else "red"} for i in range(16)])
    data = TextClassification(source, tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL))
    data.setup()
    assert data.letters == (3, 3)


COLUMNS = {
    "classes": "text",
    "glue": "sentence",
    "questions": "context",
    "answers": "text",
    "vectors": "text",
    "blocks": "text",
    "streams": "text",
}


@pytest.mark.parametrize("is_null", [True, False], ids=["null", "another key"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_a_row_without_a_text(kind, is_null, tmp_path):
    rows = [row(i) for i in range(16)]
    rows[3][COLUMNS[kind]] = None
    if not is_null:
        del rows[3][COLUMNS[kind]]
        rows[3][COLUMNS[kind].title()] = "red"
    source = write(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"column.*: sample 4 of the .* split has no text$"):
        KINDS[kind](source, tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL)).setup()


def test_a_stream_says_once_that_it_leaves_such_rows_out(tmp_path, caplog):
    rows = [row(i) for i in range(400)]
    for place in (150, 151, 390):
        rows[place]["text"] = None
    data = StreamedLanguageModeling(
        write(tmp_path, rows), tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL), 240, 100, length=8, batch_size=2
    )
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 120
    said = "text_column='text': a document of the training stream has no text; such are left out."
    assert caplog.messages.count(said) == 1


def test_a_row_that_is_held_out_is_told_by_its_own_number(tmp_path):
    rows = [row(i) for i in range(40)]
    rows[20]["text"] = None
    write(tmp_path, rows)
    source = DatasetSource(train=str(tmp_path / "rows.jsonl"), validation=None, test=None, held_out=0.4)
    with pytest.raises(ConfigError, match=r"^text_column='text': sample 21 of the train split has no text$"):
        LanguageModeling(source, tiny.tokenizer(tmp_path / "tokenizer", WORDS, SPECIAL), length=8).setup()


def test_a_text_without_tokens_is_told(tmp_path):
    """As a blank line is by tokenizers that put nothing around it; those that do give a model something to read."""
    source = write(tmp_path, [row(place) for place in range(12)])
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    bare.save_pretrained(tmp_path / "bare")
    data = TextClassification(source, str(tmp_path / "bare"))
    data.setup()
    assert len(data.raw_samples(["red", "blue"])) == 2
    with pytest.raises(ConfigError, match=r"^text 2: has no tokens by tokenizer='.*bare', so that a model would be"):
        data.raw_samples(["red", "", "blue"])
    around = TextClassification(source, tiny.tokenizer(tmp_path / "around", WORDS, SPECIAL))
    around.setup()
    assert len(around.raw_samples(["red", "", "blue"])) == 3
