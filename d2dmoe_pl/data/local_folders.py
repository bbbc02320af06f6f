"""Folders of pictures, recordings or files of rows: which are splits, and which class a picture is of."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Audio, ClassLabel, Dataset, Image, IterableDataset, load_dataset
from datasets.packaged_modules.audiofolder.audiofolder import AUDIO_EXTENSIONS
from datasets.packaged_modules.imagefolder.imagefolder import IMAGE_EXTENSIONS

from d2dmoe_pl.errors import check

EVALUATION = "evaluation"  # a test split as on the hub, but for validation beside one that is called test
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), EVALUATION),
}
DESCRIPTIONS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` reads them
MEDIA = {"imagefolder": ("image", Image, IMAGE_EXTENSIONS), "audiofolder": ("audio", Audio, AUDIO_EXTENSIONS)}


def visible(path: Path) -> Iterator[Path]:
    """The files below a folder, however deep, in order, but what is hidden; a file itself."""
    if path.is_file():
        yield path
    for place, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(each for each in folders if each[0] not in "._")
        yield from (Path(place) / each for each in sorted(files) if each[0] not in "._")


def with_found_files(split: Dataset, column: str, folder: Path | None, what: str) -> Dataset:
    """``split`` with the paths in a column, as they are or relative to a folder, whichever leads to a file.

    Args:
        split: A dataset with the column.
        column: Of paths.
        folder: Where the file is that has the rows; None for what is on the hub.
        what: What the files are, for the progress bar.
    """
    find = partial(_with_path, column=column, folder=folder)
    return split.map(find, desc=f"Finding {what}", load_from_cache_file=False)  # some may have come since


def _with_path(sample: dict[str, Any], column: str, folder: Path | None) -> dict[str, Any]:
    path = sample[column]
    beside = None if folder is None or path is None else folder / path
    return {column: str(beside) if beside is not None and not Path(path).exists() and beside.exists() else path}


def media_in(folder: Path) -> str | None:
    """What of ``MEDIA`` a folder holds, by the first such file in it; None if there is none."""
    kinds = {ending: kind for kind, (_, _, endings) in MEDIA.items() for ending in endings}
    return next((kinds[file.suffix.lower()] for file in visible(folder) if file.suffix.lower() in kinds), None)


def check_reads_recordings(argument: str) -> None:
    """Raise ``ConfigError`` unless the package is there that reads recordings, which the user gave by ``argument``."""
    is_there = find_spec("torchcodec") is not None
    check(is_there, f"{argument}: recordings are read by torchcodec; pip install torchcodec")


def is_described(folder: Path) -> bool:
    """Whether files of metadata say what the pictures or recordings in ``folder`` are."""
    return any(file.name in DESCRIPTIONS for file in visible(folder))


def split_folders(folder: Path) -> dict[str, list[Path]]:
    """The folders in ``folder`` that are splits, by the names that Hugging Face gives these.

    One whose whole name is a split's (``train``, ``val``, ...) is one, unless it is one of the classes that pictures or
    recordings are in, which may be called so too: then no such folder has folders in it, and others stand beside it.
    One with such a word in its name (``train_1``, ``my-test``) is a split if all are: ``test_tube`` beside ``bottle``
    is a class.

    Returns:
        None of them for a folder whose files, or classes, are of one split.
    """
    inside = sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] not in "._")
    inside = [each for each in inside if next(visible(each), None)]
    exact = {each: SPLIT_NAMES[each.name.lower()] for each in inside if each.name.lower() in SPLIT_NAMES}
    if exact:
        splits = grouped(exact)
        are_classes = len(exact) < len(inside) and not has_folders(splits) and all(map(media_in, inside))
        return {} if are_classes else splits
    named = {each: split for each in inside if (split := split_in(each.name)) is not None}
    return grouped(named) if len(named) == len(inside) else {}


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of a ``datasets.Dataset`` wrote a folder."""
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def saved_splits(folder: Path) -> dict[str, list[Path]]:
    """The folders of the splits that ``save_to_disk`` wrote into ``folder``, or as it; None of any other."""
    if (folder / "dataset_dict.json").is_file():
        return {name: [folder / name] for name in json.loads((folder / "dataset_dict.json").read_text())["splits"]}
    return {"train": [folder]} if is_saved(folder) else {}


def split_in(name: str) -> str | None:
    """The split whose name is a word of ``name``, the first of them; None if none is."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def grouped(splits: Mapping[Path, str]) -> dict[str, list[Path]]:
    """What is of each split, by the split's name."""
    there = set(splits.values())
    meant = "validation" if "test" in there and "validation" not in there else "test"
    named = {each: meant if split == EVALUATION else split for each, split in splits.items()}
    return {split: [each for each in named if named[each] == split] for split in dict.fromkeys(named.values())}


def has_folders(splits: Mapping[str, Sequence[Path]]) -> bool:
    """Whether there are folders in a folder of a split."""
    return any(below.is_dir() for places in splits.values() for each in places for below in each.iterdir())


def read_media(argument: str, folders: Sequence[Path], kind: str, streaming: bool) -> Dataset | IterableDataset:
    """The pictures or recordings below ``folders``, which the user gave by ``argument``, and what is said of them.

    Args:
        argument: For messages.
        folders: Where they are, one or several.
        kind: One of ``MEDIA``.
        streaming: Whether to read them as they are iterated; the class is then the folder that a file lies in.

    Raises:
        ConfigError: If one is in no folder of a class, and no file of metadata says what it is.
    """
    if kind == "audiofolder":
        check_reads_recordings(argument)
    # all of their files, whatever these are called: by names such as train_1.png some would be of other splits
    every = {"train": [str(Path(escape(os.path.abspath(each))) / "**") for each in folders]}
    loaded = load_dataset(kind, data_files=every, split="train", streaming=streaming)
    return loaded if streaming or any(map(is_described, folders)) else with_classes(argument, loaded, folders, kind)


def with_classes(argument: str, loaded: Dataset, folders: Sequence[Path], kind: str) -> Dataset:
    """``loaded`` with the class of each, the folder in one of ``folders`` that it is in, however deep."""
    column, feature, _ = MEDIA[kind]
    files = [Path(each["path"]) for each in loaded.cast_column(column, feature(decode=False))[column]]
    places = [os.path.abspath(each) for each in folders]  # as paths are, with links in them
    within = [next((each for each in places if file.is_relative_to(each)), "") for file in files]
    if not all(within):  # of an archive
        return loaded
    parts = [file.relative_to(place).parts for file, place in zip(files, within, strict=True)]
    check(
        all(len(each) > 1 for each in parts),
        f"{argument}: {next((each[0] for each in parts if len(each) == 1), '')} is in no folder of a class; must be a "
        "folder with a folder of pictures a class, or have a metadata.csv that says what they are",
    )
    classes = sorted({each[0] for each in parts})
    labels = [classes.index(each[0]) for each in parts]
    return loaded.select_columns(column).add_column("label", labels, feature=ClassLabel(names=classes))
