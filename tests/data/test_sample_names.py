"""An error about a sample names the row of the user's file, in whichever split the sample has come to be."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from d2dmoe_pl.data import (
    DatasetSource,
    ImageClassification,
    TextClassification,
    TextMultiLabel,
    TextRegression,
    TokenClassification,
)
from d2dmoe_pl.errors import ConfigError

COUNT = 9
FLAGS = {"label_columns": ["loud", "rude"]}
# what reads the samples, one of them, what is wrong with another, and what is said of that
KINDS = {
    "text": (TextClassification, {}, {"text": "a", "label": "0"}, {"text": " "}, "{sample} has only blanks"),
    "label": (TextClassification, {}, {"text": "a", "label": "0"}, {"label": ""}, "{sample} has no label"),
    "half": (TextClassification, {}, {"text": "a", "label": "0"}, {"label": "0.5"}, "{sample} has 0.5, a number"),
    "number": (TextRegression, {}, {"text": "a", "label": "0"}, {"label": "?"}, "'?' in {sample} is no number"),
    "flag": (TextMultiLabel, FLAGS, {"text": "a", "loud": 0, "rude": 1}, {"rude": 5}, "{sample} has 5; must be 0 or"),
    "words": (TokenClassification, {}, {"tokens": "a", "ner_tags": "O"}, {"tokens": ""}, "{sample} has no words"),
}


def held_out(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetSource(train=str(file), validation=None, test=None, held_out=0.3)


def read(data):
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)


@pytest.mark.parametrize("bad", range(COUNT))
class TestHeldOut:
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_it_counts_in_the_file(self, tmp_path, kind, bad):
        make, settings, good, fault, message = KINDS[kind]
        tokenizer = tiny.tokenizer(tmp_path / "tokenizer", ["a"])
        rows = [{**good, **(fault if row == bad else {})} for row in range(COUNT)]
        with pytest.raises(ConfigError) as error:
            make(held_out(tmp_path, rows), tokenizer, **settings).setup()
        assert message.format(sample=f"sample {bad + 1} of the train split") in str(error.value)

    def test_of_a_picture_and_its_label(self, tmp_path, bad):
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        rows = [{"image": "a.png", "label": str(row % 2)} for row in range(COUNT)]
        (tmp_path / "broken.png").write_bytes(b"none")
        for fault, said in (({"label": ""}, "has no label"), ({"image": "broken.png"}, "cannot be read as a picture")):
            faulty = [{**each, **(fault if row == bad else {})} for row, each in enumerate(rows)]
            data = ImageClassification(held_out(tmp_path, faulty), image_size=8, batch_size=2)
            with pytest.raises(ConfigError) as error:
                read(data)
            assert f"sample {bad + 1} of the train split" in str(error.value)
            assert said in str(error.value)


def test_of_a_split_of_its_own_it_counts_there(tmp_path):
    files = {name: tmp_path / f"{name}.csv" for name in ("train", "validation", "test")}
    for file in files.values():
        file.write_text("text,label\na,0\na,1\na,0\n")
    files["test"].write_text("text,label\na,0\na,1\na,0\n,1\n")
    source = DatasetSource(**{name: str(file) for name, file in files.items()})
    with pytest.raises(ConfigError, match="sample 4 of the test split has no text"):
        TextClassification(source, tiny.tokenizer(tmp_path / "tokenizer", ["a"])).setup()
