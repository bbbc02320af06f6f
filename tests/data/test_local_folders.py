"""Local folders: which are splits, which class a picture is of, and files of rows in them."""

import gzip
from importlib.util import find_spec

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from d2dmoe_pl.data import AudioClassification, DatasetSource
from d2dmoe_pl.data.held_out_rows import held_out
from d2dmoe_pl.data.local_folders import split_folders
from d2dmoe_pl.errors import ConfigError

LAYOUTS = {
    "splits": ({"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2}, {"train": 6, "test": 4}),
    "other names of splits": (
        {"training/cat": 2, "training/dog": 2, "val/dog": 1, "evaluation/cat": 3},
        {"train": 4, "validation": 1, "test": 3},
    ),
    "several folders of a split": (
        {"train_1/cat": 2, "train_2/dog": 2, "my-test/cat": 1, "my-test/dog": 1},
        {"train": 4, "test": 2},
    ),
    "classes": ({"cat": 3, "dog": 2}, {"train": 5}),
    "pictures that lie deeper": ({"train/cat/2023": 2, "train/cat/2024": 1, "train/dog": 2}, {"train": 5}),
    "classes called as splits are, in splits": (
        {"train/train": 2, "train/test": 3, "test/train": 1, "test/test": 1},
        {"train": 5, "test": 2},
    ),
    "classes with a split's name in theirs, in splits": (
        {"train/bullet_train": 2, "train/test tube": 3, "test/bullet_train": 1, "test/test tube": 1},
        {"train": 5, "test": 2},
    ),
    "classes with a split's name in theirs": ({"bullet_train": 2, "test tube": 1, "dog": 1}, {"train": 4}),
    "classes one of which is called as a split": ({"train": 2, "bus": 1, "car": 3}, {"train": 6}),
}


def write_pictures(folder, number):
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(np.full((4, 4, 3), 9 * i, dtype=np.uint8)).save(folder / f"test_{i}.png")


def write_rows(file, number=4):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("text,label\n" + "".join(f"{file.stem} {i},{'ab'[i % 2]}\n" for i in range(number)))


def source(folder, **splits):
    return DatasetSource(folder and str(folder), **{"validation": None, "test": None, "held_out": 0.4} | splits)


@pytest.mark.parametrize(("folders", "numbers"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_picture_is_in_its_own_split_and_class(tmp_path, folders, numbers):
    for folder, number in folders.items():
        write_pictures(tmp_path / "data [1]" / folder, number)
    wanted = {split: split for split in ("validation", "test") if split in numbers}
    splits = source(tmp_path / "data [1]", **wanted, train="train").load()
    held_out = len({"validation", "test"} - set(wanted))
    if held_out == 0:
        assert {name: len(split) for name, split in splits.items()} == numbers
    assert sum(map(len, splits.values())) == sum(numbers.values())
    for split in wanted:
        assert len(splits[split]) == numbers[split]
    classes = {(name.rpartition("/")[0] and name.split("/")[1]) or name for name in folders}
    seen = {split.features["label"].int2str(label) for split in splits.values() for label in split["label"]}
    assert seen == classes


def test_a_part_of_a_split(tmp_path):
    for folder, number in LAYOUTS["splits"][0].items():
        write_pictures(tmp_path / "data" / folder, number)
    splits = source(tmp_path / "data", train="train[:4]", validation="train[4:]", test="test[50%:]").load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 2, "test": 2}
    write_rows(tmp_path / "rows" / "train.csv", 6)
    splits = source(tmp_path / "rows", train="train[:4]", validation="train[4:]", test="train[:1]+train[-1:]").load()
    assert splits["validation"]["text"] == ["train 4", "train 5"]
    assert splits["test"]["text"] == ["train 0", "train 5"]


def test_files_of_rows_in_a_folder_are_one_split(tmp_path):
    for name in ("one.csv", "sub/two.csv", ".hidden.csv", "notes.md"):
        write_rows(tmp_path / "train" / name)
    whole = source(None, train=str(tmp_path / "train"))
    assert sum(map(len, whole.load().values())) == 8
    write_rows(tmp_path / "test" / "three.csv", 3)
    splits = source(tmp_path, test="test").load()  # folders of splits
    assert len(splits["test"]) == 3
    assert len(splits["train"]) + len(splits["validation"]) == 8


def test_rows_may_name_pictures_beside_them(tmp_path):
    write_pictures(tmp_path / "images", 3)
    write_rows(tmp_path / "reviews.csv")
    assert source(tmp_path).load()["train"].column_names == ["text", "label"]
    for split in ("train", "test"):  # in folders that are called as splits are, too
        write_pictures(tmp_path / split, 2)
        write_rows(tmp_path / f"{split}.csv")
    splits = source(tmp_path, test="test").load()
    assert set(splits["test"]["text"]) == {f"test {i}" for i in range(4)}
    assert {text.split()[0] for text in splits["train"]["text"]} == {"train"}


def test_a_dataset_that_says_itself_what_its_splits_are(tmp_path):
    write_rows(tmp_path / "train" / "one.csv")
    write_rows(tmp_path / "more" / "two.csv", 7)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: more/*.csv\n---\n"
    )
    assert sum(map(len, source(tmp_path).load().values())) == 7


def test_what_datasets_saved(tmp_path):
    rows = Dataset.from_dict({"text": list("abcde"), "label": list("vwxyz")})
    rows.save_to_disk(tmp_path / "whole")
    assert sum(map(len, source(tmp_path / "whole").load().values())) == 5
    assert sum(map(len, source(None, train=str(tmp_path / "whole")).load().values())) == 5
    DatasetDict(train=rows, unseen=rows.select([1, 3])).save_to_disk(tmp_path / "splits")
    assert source(tmp_path / "splits", test="unseen").load()["test"]["text"] == ["b", "d"]
    assert list(source(tmp_path / "splits", test="unseen").stream()["test"])[1] == {"text": "d", "label": "y"}


@pytest.mark.parametrize(
    ("files", "splits", "message"),
    [
        (["train/cat/0.png"], {"test": "test"}, r"dataset='.*': has no split 'test'; there are train$"),
        (["train/0.png", "test/0.png"], {}, r"dataset='.*': 0.png is in no folder of a class; must be a folder with"),
        (["train/a.csv", "train/b.tsv"], {}, r"dataset='.*': all files must end in .csv, as .*a.csv does, but there"),
    ],
)
def test_what_is_laid_out_otherwise(tmp_path, files, splits, message):
    for file in files:
        write_rows(tmp_path / file)
        if file.endswith(".png"):
            Image.new("RGB", (4, 4)).save(tmp_path / file)
    with pytest.raises(ConfigError, match=message):
        source(tmp_path, **splits).load()


def test_a_folder_of_nothing_that_can_be_read(tmp_path):
    (tmp_path / "notes.md").write_text("none")
    with pytest.raises(ConfigError, match=r"train='.*': holds no pictures, no recordings, and no files that end in"):
        source(None, train=str(tmp_path)).load()


def test_a_path_that_is_a_pattern_to_datasets(tmp_path):
    write_rows(tmp_path / "rows [1]" / "data" / "train.csv")
    with pytest.raises(ConfigError, match=r"dataset='.*': has \[\] in its path, which stand for patterns there; must"):
        source(tmp_path / "rows [1]").load()
    assert len(source(tmp_path / "rows [1]" / "data").load()["train"]) > 0


def test_folders_that_hold_nothing_are_no_splits(tmp_path):
    write_pictures(tmp_path / "cat", 1)
    (tmp_path / "test").mkdir()
    (tmp_path / "_train").mkdir()
    assert split_folders(tmp_path) == {}


@pytest.mark.skipif(find_spec("torchcodec") is not None, reason="torchcodec is installed")
def test_recordings_need_a_package(tmp_path):
    (tmp_path / "train" / "yes").mkdir(parents=True)
    (tmp_path / "train" / "yes" / "0.wav").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"dataset='.*': recordings are read by torchcodec; pip install torchcodec$"):
        source(tmp_path).load()
    recordings = AudioClassification(source(tmp_path), "nowhere")
    with pytest.raises(ConfigError, match=r"audio_column='audio': recordings are read by torchcodec; pip install"):
        recordings.raw_samples(["0.wav"])


@pytest.mark.parametrize("stray", ["metadata.txt", "cat/indoor/metadata.xml", "LICENSE.txt", "cat/notes.txt"])
def test_a_stray_file_changes_no_class(tmp_path, stray):
    for folder in ("cat/indoor", "cat/outdoor", "dog/indoor"):
        write_pictures(tmp_path / "data" / folder, 4)
    (tmp_path / "data" / stray).write_text("All images\n\nunder a licence")
    splits = source(tmp_path / "data").load()
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert sum(map(len, splits.values())) == 12


def test_a_pattern_reaches_every_depth(tmp_path):
    for name in ("a", "x/b", "x/y/c"):
        write_rows(tmp_path / "data" / f"{name}.csv")
    splits = source(None, train=f"{tmp_path}/data/**/*.csv").load()
    assert {text[0] for split in splits.values() for text in split["text"]} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train", "eval", "test"], {"train": 4, "validation": 5, "test": 6}),
        (["train", "eval"], {"train": 4, "test": 5}),
        (["train", "evaluation", "validation"], {"train": 4, "test": 5, "validation": 6}),
    ],
)
def test_eval_is_for_validation_beside_a_test(files, expected, tmp_path):
    for number, name in enumerate(files, 4):
        write_rows(tmp_path / f"{name}.csv", number)
    splits = {name: name if name in expected else None for name in ("validation", "test")}
    source = DatasetSource(dataset=str(tmp_path), held_out=0.3, **splits)
    assert {name: len(split) for name, split in source.load().items() if splits.get(name)} == {
        name: number for name, number in expected.items() if name != "train"
    }


@pytest.mark.parametrize("where", ["folder", "pattern", "dataset"])
def test_a_file_and_the_same_compressed(where, tmp_path):
    write_rows(tmp_path / "train.csv")
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress((tmp_path / "train.csv").read_bytes()))
    given = {"folder": str(tmp_path), "pattern": str(tmp_path / "train.*"), "dataset": "train"}[where]
    source = DatasetSource(str(tmp_path) if where == "dataset" else None, train=given, validation=None, test=None)
    with pytest.raises(ConfigError, match=r"train.csv and .*train.csv.gz are one file, compressed and not; remove one"):
        source.load()


def test_a_compressed_file_that_was_cut_short(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": 1}\n' * 999)[:-9])
    source = DatasetSource(train=str(tmp_path / "a.jsonl.gz"), validation=None, test=None)
    with pytest.raises(ConfigError, match=r"train='.*a.jsonl.gz' of dataset=None: cannot be loaded: Compressed file"):
        source.load()


def test_rows_that_are_held_out_together():
    rows = {"context": [f"text {i // 5}" for i in range(200)], "question": [f"{i}" for i in range(200)]}
    parts = held_out(Dataset.from_dict(rows), "test", 0.1, 0, "context")
    assert {name: len(part) for name, part in parts.items()} == {"train": 180, "test": 20}
    assert not set(parts["train"]["context"]) & set(parts["test"]["context"])
    again = held_out(Dataset.from_dict(rows), "test", 0.1, 0, "context")
    assert again["test"]["question"] == parts["test"]["question"]
    odd = held_out(Dataset.from_dict({"context": ["a", None, "b", None]}), "test", 0.1, 0, "context")
    assert sorted(map(len, odd.values())) in ([1, 3], [2, 2])
    assert held_out(Dataset.from_dict(rows), "test", 0.1, 1, "context")["test"]["question"] != parts["test"]["question"]
    with pytest.raises(ConfigError, match=r"test=None: .* whose 1 different values in 'context' are too few for the"):
        held_out(Dataset.from_dict({"context": ["one"] * 9}), "test", 0.1, 0, "context")
