"""Folders of pictures and recordings, and tables of their paths, become a recipe's data."""

import json

import datasets
import pytest
import stand_ins
import timm
import tiny
from PIL import Image
from table_files import write

from d2dmoe_pl import compress
from d2dmoe_pl.compress_arguments import compress_parser
from d2dmoe_pl.compression.recipe_for_model import _data
from d2dmoe_pl.data import DatasetSource, ImageClassification
from d2dmoe_pl.errors import ConfigError


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(data, model, place=None, **options):
    """What a recipe says of its data, and the task; ``place`` is where a model of Hugging Face is."""
    given = compress_parser().get_defaults()
    for name, value in {"data": data, "model": model, **options}.items():
        given[name] = value
    return _data(given, place)


def test_pictures(tmp_path):
    stand_ins.write_images(tmp_path / "pictures", {"train": 12, "validation": 6})
    made, task = config(str(tmp_path / "pictures"), "vit", "vit")
    assert (task, made["class_path"]) == ("image-classification", "ImageClassification")
    assert made["init_args"]["processor"] == "vit"
    made, _ = config(str(tmp_path / "pictures"), "vit_tiny_patch16_224")
    assert made["init_args"]["image_size"] == 224
    assert made["init_args"]["source"]["test"] is None


@pytest.mark.parametrize("ending", ["png", "JPEG", "wav", "flac"])
@pytest.mark.parametrize("column", ["path", "filename", "wherever"])
def test_paths_say_what_files_are(tmp_path, column, ending):
    rows = [{"Id": str(n), column: f"some/{n}.{ending}", "class": ["cat", "dog"][n % 2]} for n in range(30)]
    made, task = config(write(datasets.Dataset.from_list(rows), tmp_path / "all.csv"), "some/model", "some/model")
    kind = "image" if ending in ("png", "JPEG") else "audio"
    assert (task, made["class_path"]) == (f"{kind}-classification", f"{kind.title()}Classification")
    arguments = made["init_args"]
    assert (arguments[f"{kind}_column"], arguments["label_column"]) == (column, "class")
    assert arguments["processor"] == "some/model"


def test_recordings(tmp_path, monkeypatch):
    monkeypatch.setattr("d2dmoe_pl.data.local_folders.find_spec", lambda name: name)
    monkeypatch.setattr(datasets.Audio, "encode_example", lambda self, value: {"path": value, "bytes": None})
    for n in range(24):
        file = tmp_path / "sounds" / ["low", "high"][n % 2] / f"{n}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    made, task = config("sounds", "whisper", "whisper")
    assert (task, made["init_args"]["audio_column"], made["init_args"]["processor"]) == (
        "audio-classification",
        "audio",
        "whisper",
    )
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text("".join(json.dumps({"audio": [0.0, n / 7], "label": n % 2}) + "\n" for n in range(20)))
    assert config(str(numbers), "whisper", "whisper")[1] == "audio-classification"
    with pytest.raises(ConfigError, match="task='audio-classification': timm's models are for pictures; must"):
        config("sounds", "vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="image_column=None: none of audio, label is one of files for image-classif"):
        config("sounds", "vit", "vit", task="image-classification")


def test_what_is_in_a_column_goes_before_names(tmp_path):
    rows = [{"path": str(n), "clip": f"{n}.wav", "label": n % 2} for n in range(30)]
    made, task = config(write(datasets.Dataset.from_list(rows), tmp_path / "all.csv"), "some/model", "some/model")
    assert (task, made["init_args"]["audio_column"]) == ("audio-classification", "clip")
    numbers = tmp_path / "numbers.jsonl"
    rows = [{"image": str(n), "heard": [0.0, n / 7], "label": n % 2} for n in range(20)]
    numbers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert config(str(numbers), "some/model", "some/model")[1] == "image-classification"
    assert config(str(numbers), "some/model", "some/model", audio_column="heard")[1] == "audio-classification"


def test_pictures_without_labels_are_told(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(24):
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(ConfigError, match="image_column='image': is all that the data has; must have labels too, by a"):
        config("flat", "vit", "vit")
    (tmp_path / "flat" / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(24))
    )
    made, _ = config("flat", "vit", "vit")
    assert (made["init_args"]["image_column"], made["init_args"]["label_column"]) == ("image", "label")


@pytest.mark.parametrize("classes", [("cat", "dog"), ("bus", "train"), ("cat", "test")])
def test_pictures_and_classes_may_be_called_as_splits_are(tmp_path, classes):
    for i in range(24):
        folder = tmp_path / "pictures" / classes[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{('train', 'test', 'some')[i % 3]}_{i}.png")
    made, task = config("pictures", "vit", "vit")
    assert (task, made["init_args"]["label_column"]) == ("image-classification", "label")
    splits = DatasetSource(**made["init_args"]["source"]).load()
    assert sum(map(len, splits.values())) == 24
    assert splits["train"].features["label"].names == sorted(classes)


def test_a_timm_model_sees_pictures_as_it_was_trained_to(tmp_path):
    stand_ins.write_images(tmp_path / "pictures", {"train": 12})
    for model in (
        "vit_base_patch16_clip_384.openai_ft_in12k_in1k",
        "vit_base_patch32_224.sam_in1k",
        "mixer_b16_224.miil_in21k_ft_in1k",
    ):
        arguments = config("pictures", model)[0]["init_args"]
        arguments["source"] = DatasetSource(**arguments["source"])
        data = ImageClassification(**arguments)
        data.load_processor()
        expected = timm.data.resolve_data_config({}, pretrained_cfg=timm.models.get_pretrained_cfg(model).to_dict())
        found = timm.data.resolve_data_config({}, pretrained_cfg=data.preprocessing.pretrained_cfg())
        assert {k: str(v).strip("()[]") for k, v in found.items()} == {
            k: str(v).strip("()[]") for k, v in expected.items()
        }


def test_a_model_that_is_not_there_is_told_as_the_model(tmp_path):
    """Rather than as a tokenizer or a processor, which would be its own and nobody has named."""
    stand_ins.write_emotion(tmp_path / "texts")
    stand_ins.write_images(tmp_path / "pictures", {"train": 24})
    stand_ins.write(tmp_path, "clips", [{"audio": [0.0, n / 7], "label": n % 2} for n in range(24)])
    tiny.bert_config().save_pretrained(tmp_path / "weightless")
    for data in ("texts", "pictures", "clips.jsonl"):
        for model in ("misspelt", "nobody/misspelt"):
            with pytest.raises(ConfigError, match=rf"^model='{model}': neither a folder nor a reachable hub name \("):
                compress(model, data)
        said = "tokenizer=None" if data == "texts" else "model='weightless'"  # of the two there is one option alone
        with pytest.raises(ConfigError, match=rf"^{said}: "):
            compress("weightless", data)
