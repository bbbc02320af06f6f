"""What is in files is told, wherever they are named, and whatever their times."""

import os
import shutil

import pytest

from d2dmoe_pl import given_files
from d2dmoe_pl.given_files import content, contents


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    for name in ("train.csv", "test.csv", "a/picture.png"):
        (tmp_path / "data" / name).write_text(name)
    return tmp_path / "data"


@pytest.mark.parametrize("asked", ["train.csv", "", "*.csv", "**/*.png"])
def test_other_contents_are_another_word_and_copies_are_the_same(folder, asked, tmp_path):
    path = os.path.join(folder, asked)
    before = content(path, tmp_path / "runs")
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "train.csv", (1, 1))
    assert content(os.path.join(copy, asked), tmp_path / "runs") == before
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_text(file.read_text().replace("t", "u"))
    assert content(path, tmp_path / "runs") != before


def test_a_new_file_and_hidden_ones(folder, tmp_path):
    assert content(str(folder), tmp_path, ["data"]) is None  # all of it is a chain's own
    before = content(str(folder), tmp_path / "runs")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "file").write_text("")
    (folder / ".hidden").write_text("")
    assert content(str(folder), tmp_path / "runs") == before
    (folder / "more.csv").write_text("")
    assert content(str(folder), tmp_path / "runs") != before


def test_what_a_chain_leaves_beside_its_data_is_not_of_it(folder):
    before = content(str(folder), folder / "runs")
    (folder / "runs").mkdir()
    (folder / "runs" / "model.safetensors").write_text("")
    assert content(str(folder), folder / "runs") == before
    assert content(str(folder / "runs"), folder / "runs") is None


def test_any_byte_of_what_is_not_huge_counts(tmp_path):
    file, lines = tmp_path / "train.csv", [f"some text number {i},cat" for i in range(200_000)]
    file.write_text("\n".join(lines))
    before = content(str(file))
    lines[123_456] = lines[123_456].replace("cat", "dog")
    file.write_text("\n".join(lines))
    assert content(str(file)) != before


def test_linked_folders_count_and_rings_end(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "data").symlink_to(folder)
    before = content(str(tmp_path / "links"))
    assert before is not None
    (folder / "train.csv").write_text("TRAIN.csv")
    assert content(str(tmp_path / "links")) != before
    (folder / "round").symlink_to(tmp_path / "links")
    assert content(str(tmp_path / "links")) is not None


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_large_file_is_told_by_its_ends_and_parts(tmp_path, place, monkeypatch):
    monkeypatch.setattr(given_files, "MOST", 0)
    file = tmp_path / "model.safetensors"
    size = given_files.BLOCK * (given_files.LEAST + 5)
    values = bytearray(size)
    file.write_bytes(values)
    before = content(str(file), tmp_path / "runs")
    values[place] = 1
    file.write_bytes(values)
    assert content(str(file), tmp_path / "runs") != before
    values[place] = 0
    file.write_bytes(values + b"0")
    assert content(str(file), tmp_path / "runs") != before


def test_of_many_files_names_and_sizes_are_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(given_files, "MOST_READ", 2)
    before = content(str(folder), tmp_path / "runs")
    (folder / "train.csv").write_text("TRAIN.csv")
    assert content(str(folder), tmp_path / "runs") == before
    (folder / "train.csv").write_text("longer.csv")
    assert content(str(folder), tmp_path / "runs") != before


def test_settings_that_name_files(folder, tmp_path):
    file, other = str(folder / "train.csv"), str(folder / "test.csv")
    more = str(folder / "a" / "picture.png")
    config = {"data.init_args.source.train": [file, other], "data.init_args.label_column": file, "a.name": "nowhere"}
    config |= {"model.init_args.teacher": None, "seed": 3, "b.dataset": str(folder)}
    found = contents({**config, "data.init_args.source.more.test_hard": more}, tmp_path / "runs")
    assert list(found) == [f"content of {path}" for path in (file, other, str(folder), more)]


@pytest.mark.parametrize("asked", ["data/train.csv", "data", "data/*.csv"])
def test_data_in_the_output_folder_is_told_and_what_phases_leave_there_is_not(folder, tmp_path, asked):
    path = os.path.join(tmp_path, asked)
    before = content(path, tmp_path, ["fine_tuning"])
    (folder / "train.csv").write_text("others")
    assert None is not before != content(path, tmp_path, ["fine_tuning"])
    (tmp_path / "fine_tuning" / "artifact").mkdir(parents=True)
    (tmp_path / "fine_tuning" / "artifact" / "config.json").write_text("{}")
    assert content(str(tmp_path / "fine_tuning" / "artifact"), tmp_path, ["fine_tuning"]) is None
    assert content(str(tmp_path / "*" / "artifact"), tmp_path, ["fine_tuning"]) is None
