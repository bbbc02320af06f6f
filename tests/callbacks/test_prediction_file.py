"""Predictions in a file: what is said of each sample, and what it cost, which adds up to what a sweep reports."""

import csv
import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from datasets.table import embed_table_storage
from digits_models import DIGIT_LABELS
from PIL import Image
from stand_ins import ANIMALS, COLOURS, write_emotion, write_images

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.callbacks import TauSweep
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.cli import given_inputs, main
from d2dmoe_pl.data import DatasetSource, ImageClassification, TextClassification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.sample_cost import summed_by_sample
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import FineTuning, RecoveryTuning

LABELS = sorted(ANIMALS)


@pytest.fixture
def texts(tmp_path):
    """Texts of several lengths with their labels, and a routed model for them."""
    write_emotion(tmp_path / "texts")
    (tmp_path / "texts" / "test.csv").write_text(
        "text,label\n" + "".join(f"{'red ' * (1 + i % 4)}{ANIMALS[i % 5]},{ANIMALS[i % 5]}\n" for i in range(11))
    )
    words = [*COLOURS, *ANIMALS]
    tokenizer = tiny.tokenizer(tmp_path / "tok", words, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    model = tiny.SOURCES["bert"]().build(LABELS[::-1]).eval()
    tiny._spread(model)
    tiny.swap_activation_(model, tiny.ActivationConfig("relu"))
    save_artifact(tiny.route_(model, tau=0.3), tmp_path / "artifact")
    where = DatasetSource(**{name: str(tmp_path / "texts" / f"{name}.csv") for name in ("train", "validation", "test")})
    data = lambda: TextClassification(where, tokenizer, batch_size=4, group_by_length=True)  # noqa: E731
    return str(tmp_path / "artifact"), data


def predicted(trainer, artifact, data, file, inputs=None):
    phase = RecoveryTuning(init_from=artifact)
    trainer(callbacks=[PredictionFile(str(file), inputs)]).predict(phase, datamodule=data, return_predictions=False)
    return phase


def test_a_row_a_sample_in_the_splits_order(trainer, texts, tmp_path):
    artifact, data = texts
    predicted(trainer, artifact, data(), tmp_path / "out" / "a.csv")
    rows = list(csv.DictReader((tmp_path / "out" / "a.csv").open()))
    assert [int(row["sample"]) for row in rows] == list(range(1, 12))
    assert [row["label"] for row in rows] == [ANIMALS[i % 5] for i in range(11)]
    for row in rows:
        shares = {name: float(row[f"probability of {name}"]) for name in LABELS}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
        assert row["prediction"] == max(shares, key=shares.get)
    predicted(trainer, artifact, data(), tmp_path / "a.parquet")
    again = Dataset.from_parquet(str(tmp_path / "a.parquet"))
    assert again["prediction"][:] == [row["prediction"] for row in rows]


def test_samples_that_are_held_out_have_the_numbers_that_they_have_in_their_file(trainer, texts, tmp_path):
    artifact, made = texts
    data = made()
    data.source = DatasetSource(train=data.source.train, validation=None, test=None, held_out=0.3)
    predicted(trainer, artifact, data, tmp_path / "a.csv")
    labels = [row["label"] for row in csv.DictReader(Path(data.source.train).read_text().splitlines())]
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["label"] for row in rows] == [labels[int(row["sample"]) - 1] for row in rows]
    assert [int(row["sample"]) for row in rows] != list(range(1, len(rows) + 1))


def test_costs_add_up_to_what_a_sweep_reports(trainer, texts, tmp_path):
    artifact, data = texts
    predicted(trainer, artifact, data(), tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    sweep = TauSweep([0.3])
    trainer(callbacks=[sweep]).test(RecoveryTuning(init_from=artifact), datamodule=data(), verbose=False)
    (row,) = sweep.rows["test"]
    assert sum(int(row["flops"]) for row in rows) / len(rows) == pytest.approx(row.model_flops)
    tokens = [3 + 1 + i % 4 for i in range(11)]  # with [CLS] and [SEP]
    weighted = sum(float(row["experts_percent"]) * n for row, n in zip(rows, tokens, strict=True)) / sum(tokens)
    assert weighted == pytest.approx(row.experts_percent)
    assert len({row["flops"] for row in rows}) > 4


def test_costs_of_a_layer_that_runs_several_times(trainer, texts, tmp_path):
    config = transformers.AlbertConfig(
        **tiny.SHAPE, embedding_size=12, vocab_size=40, num_labels=len(LABELS), max_position_embeddings=32
    )
    model = transformers.AlbertForSequenceClassification(config).eval()
    tiny._spread(model)
    model.config.id2label = dict(enumerate(LABELS))
    save_artifact(tiny.route_(model, tau=0.3), tmp_path / "albert")
    assert len(moe_layers(model)) == 1
    _, data = texts
    predicted(trainer, str(tmp_path / "albert"), data(), tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    sweep = TauSweep([0.3])
    trainer(callbacks=[sweep]).test(
        RecoveryTuning(init_from=str(tmp_path / "albert")), datamodule=data(), verbose=False
    )
    (row,) = sweep.rows["test"]
    assert sum(int(row["flops"]) for row in rows) / len(rows) == pytest.approx(row.model_flops)


def test_raw_texts(trainer, texts, tmp_path):
    artifact, data = texts
    with_texts = data()
    inputs = ["red cat", "blue blue dog", "gnu"]
    with_texts.predict_for(inputs)
    phase = predicted(trainer, artifact, with_texts, tmp_path / "a.csv", inputs)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["input"] for row in rows] == inputs
    assert "label" not in rows[0]
    with torch.no_grad():
        encoded = with_texts.tokenizer(inputs[1], return_tensors="pt")
        logits = phase.model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[0]
    assert rows[1]["prediction"] == LABELS[::-1][int(logits.argmax())]


def test_of_limited_batches_the_first_are_named(tmp_path):
    callback = PredictionFile(str(tmp_path / "a.csv"), ["a", "b", "c"])
    callback.rows, callback._watching = [{"prediction": "x"}, {"prediction": "y"}], nullcontext()
    callback.on_predict_end(None, SimpleNamespace(task=SimpleNamespace(joined=list)))
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(row["input"], row["prediction"]) for row in rows] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("test", ["my/test", None])
@pytest.mark.parametrize("are_inside", [False, True])
def test_pictures_have_the_names_of_their_files(trainer, tmp_path, monkeypatch, test, are_inside):
    """Of a split that is held out too, and of pictures whose bytes are in a file of rows."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("my"), {"train": 40, "test": 7})
    source = DatasetSource(train="my/train", validation=None, test=test, held_out=0.3)
    if are_inside:
        for name, split in source.load().items():
            split.with_format("arrow").map(embed_table_storage, batched=True).to_parquet(f"{name}.parquet")
        source = DatasetSource(train="train.parquet", validation=None, test=test and "test.parquet", held_out=0.3)
    model = tiny.TimmModel("vit_tiny_patch16_224", **{**tiny.DIGITS_VIT, "in_chans": 3}).build(LABELS[:3])
    save_artifact(model, "dense")
    data = ImageClassification(source, image_size=8, batch_size=4)
    predicted(trainer, "dense", data, "a.csv")
    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert list(rows[0])[:3] == ["file", "sample", "label"]
    assert len({row["file"] for row in rows}) == len(rows) >= 4
    colours = {row["file"]: Image.open(next(Path("my").rglob(Path(row["file"]).name))).getpixel((0, 0)) for row in rows}
    for row in rows:
        assert Path(row["file"]).name == row["file"] if are_inside else Path(row["file"]).is_file()
        assert max(range(3), key=colours[row["file"]].__getitem__) == ANIMALS.index(row["label"])


def test_numbers_and_dense_models(trainer, digits, tmp_path):
    source = tiny.TimmModel("vit_tiny_patch16_224", **tiny.DIGITS_VIT)
    save_artifact(source.build(DIGIT_LABELS), tmp_path / "dense")
    phase = FineTuning(init_from=str(tmp_path / "dense"))
    trainer(callbacks=[PredictionFile(str(tmp_path / "a.csv"))]).predict(phase, datamodule=digits)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == 400
    assert rows[0].keys() == {"sample", "label", "prediction", *(f"probability of {name}" for name in DIGIT_LABELS)}


def test_summed_by_sample():
    assert summed_by_sample(torch.tensor([1, 2, 0, 2]), [2, 1, 1]) == [3, 0, 2]


def test_a_place_that_takes_no_file_is_told_before_all_is_computed(trainer, texts, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    artifact, data = texts
    for place, said in (("file/a.csv", "no files can be written there"), ("folder.csv", "is a folder; must be a file")):
        file = PredictionFile(str(tmp_path / place))
        with pytest.raises(ConfigError, match=rf"^output='.*{place}': {said}"):
            trainer(callbacks=[file]).predict(RecoveryTuning(init_from=artifact), datamodule=data())
        assert not file.rows


def test_what_cannot_be_written():
    with pytest.raises(ConfigError, match=r"output='a.txt': the ending must be one of .csv, .parquet"):
        PredictionFile("a.txt")


class TestCommand:
    def test_inputs(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        (tmp_path / "c.wav").write_bytes(b"")
        Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
        assert given_inputs() is None
        assert given_inputs(text=["a"]) == ["a"]
        assert given_inputs(text_file=str(tmp_path / "a.txt")) == ["one", "", "two"]  # a row a line
        for place in (tmp_path, tmp_path / "b.png"):
            assert given_inputs(images=str(place)) == [str(tmp_path / "b.png")]
        assert given_inputs(recordings=str(tmp_path)) == [str(tmp_path / "c.wav")]
        with pytest.raises(ConfigError, match="text, text_file, images, recordings: at most one of these can be given"):
            given_inputs(["a"], "b")
        with pytest.raises(ConfigError, match="text_file='/nowhere': no such file"):
            given_inputs(text_file="/nowhere")
        for name in ("images", "recordings"):
            with pytest.raises(ConfigError, match=rf"{name}='.*none': there is nothing to predict for"):
                given_inputs(**{name: str(tmp_path / "none")})

    def test_a_line_is_a_text_and_what_is_hidden_no_picture(self, tmp_path, monkeypatch):
        file = tmp_path / "a.txt"
        file.write_bytes("\ufeffone\x0ctwo\r\nthree\u2028four\n".encode())
        assert given_inputs(text_file=str(file)) == ["one\x0ctwo", "three\u2028four"]
        file.write_bytes("gr\u00fcn\n".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"a.txt: line 1: not UTF-8; save it as UTF-8"):
            given_inputs(text_file=str(file))
        given = "\ufeffone\x0ctwo\r\n\nthree\u2028four\n".encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="latin-1"))
        assert given_inputs(text_file="-") == ["one\x0ctwo", "", "three\u2028four"]
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\ngr\xfcn\n"), encoding="latin-1"))
        with pytest.raises(ConfigError, match=r"^text_file='-': line 2: not UTF-8; save it as UTF-8$"):
            given_inputs(text_file="-")
        (tmp_path / ".thumbnails").mkdir()
        for name in ("b.png", "._b.png", ".thumbnails/b.png", "c.pdf"):
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "d.png").mkdir()
        assert given_inputs(images=str(tmp_path)) == [str(tmp_path / "b.png")]

    def test_from_the_command_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        save_artifact(tiny.TimmModel("vit_tiny_patch16_224", **tiny.DIGITS_VIT).build(DIGIT_LABELS), tmp_path / "dense")
        start = ["--model", "FineTuning", f"--model.init_args.init_from={tmp_path / 'dense'}", "--data", "Digits"]
        quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        main(["predict", *start, *quiet, "--output", "out.csv"])
        assert "Predictions: out.csv" in capsys.readouterr().out
        assert len((tmp_path / "out.csv").read_text().splitlines()) == 401
        with pytest.raises(SystemExit):
            main(["predict", *start, *quiet, "--text", "a b"])
        assert "error: Digits: predicts for the samples of its own splits only" in capsys.readouterr().err

    def test_paths_are_no_texts(self, texts, tmp_path, monkeypatch, capsys):
        """A model of texts would predict for the paths of pictures as if they were some."""
        artifact, _ = texts
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (2, 2)).save("a.png")
        start = [f"--model.init_args.init_from={artifact}", "--data", "TextClassification"]
        reads = [f"--data.init_args.tokenizer={tmp_path / 'tok'}", "--data.init_args.source.train=texts/train.csv"]
        with pytest.raises(SystemExit):
            main(["predict", "--model", "RecoveryTuning", *start, *reads, "--trainer.logger=false", "--images=a.png"])
        assert capsys.readouterr().err == (
            "error: images='a.png': TextClassification predicts for texts; must be text or text_file\n"
        )
