"""Splits of any Hugging Face dataset, on the hub or in local files, loaded whole or streamed."""

import lzma
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape, glob
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    IterableDataset,
    List,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetsError

from d2dmoe_pl.data.file_names import check_not_twice, ending_of
from d2dmoe_pl.data.file_rows import READERS, check_decodable, hold_articles, json_fault, lines_of, rows_of, stamps
from d2dmoe_pl.data.generated_dataset import generated
from d2dmoe_pl.data.held_out_rows import held_out
from d2dmoe_pl.data.local_folders import (
    DESCRIPTIONS,
    grouped,
    has_folders,
    is_saved,
    media_in,
    read_media,
    saved_splits,
    split_folders,
    split_in,
    visible,
)
from d2dmoe_pl.data.own_data_checks import SPLITS
from d2dmoe_pl.data.sample_names import sample_numbers
from d2dmoe_pl.data.squad.article_files import in_questions
from d2dmoe_pl.errors import ConfigError, check, some_of
from d2dmoe_pl.typed_settings import check_types_

# what reads the kinds of files that are not read row by row here
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ENDINGS = (*READERS, *BUILDERS)
ARCHIVES = (".zip", ".tar", ".tgz")
CUT_SHORT = (EOFError, zlib.error, lzma.LZMAError)  # compressed files
PATTERN = set("*?[]")  # what datasets takes for a pattern in the path of a folder


@dataclass
class DatasetSource:
    """Where the splits of a dataset are.

    Attributes:
        dataset: Hub name, or a folder with a file (``train.csv``) or a folder (``train/``) a split, or all of training;
            None if ``train``, ``validation`` and ``test`` are all paths.
        config: Name of the hub dataset's configuration.
        train: Name of the training split of ``dataset``; or, with a ``/`` or the ending of a file in it, a path: a
            local CSV, TSV, JSON (lines), Parquet, CoNLL (words with tags) or text file, whose paragraphs are samples
            with the column ``text``; a pattern for several files (``data/*.json.gz``); or a folder of such files, of
            pictures or of recordings. A path needs no ``dataset``, and where there is one, is read instead of it. A
            text file that begins with the title of an article as WikiText's do, `` = Title = `` between blank lines,
            has whole articles as samples, as they stand there; the last goes on in the next file of a pattern, up to a
            title (a stream has each file's part by itself).
        validation: The same for validation; None to hold out part of the training split.
        test: The same for test; None to hold out part of the training split.
        more: Further splits to evaluate on, by names that begin with ``validation_`` or ``test_``; each as above.
        held_out: Share of the training split for each split that is held out of it.
        seed: Decides which samples are held out.

    Raises:
        ConfigError: For a value of another type.
    """

    dataset: str | None = None
    config: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"
    more: dict[str, str] = field(default_factory=dict)
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_types_(self)
        self.held_out_numbers: dict[str, list[int]] = {}  # once loaded: which samples of the training split, from 1

    def load(self, together: str | None = None) -> dict[str, Dataset]:
        """The splits by name: ``train``, ``validation``, ``test`` and those in ``more``.

        Args:
            together: Column of which rows that are alike are held out together, so that none is in two splits.

        Raises:
            ConfigError: If a split cannot be loaded; the message says which and why, with file and line where a file is
                malformed.
        """
        check(0.0 < self.held_out < 0.5, f"held_out={self.held_out}: must lie between 0 and 0.5")
        for name in self.more:
            check(
                name.startswith(("validation_", "test_")),
                f"more={{{name!r}: ...}}: names must begin with validation_ or test_",
            )
        wanted = {name: getattr(self, name) for name in SPLITS} | self.more
        splits = {name: self._load_split(name, where) for name, where in wanted.items() if where is not None}
        for name in SPLITS:
            if name not in splits:
                splits |= held_out(splits["train"], name, self.held_out, self.seed, together)
                self.held_out_numbers[name] = sample_numbers(splits[name])
        return splits

    def stream(self) -> dict[str, IterableDataset]:
        """The splits by name, but those that are None, to be read as they are iterated; a file is a shard.

        Raises:
            ConfigError: If a split cannot be found; the message says which and why.
        """
        wanted = {name: getattr(self, name) for name in SPLITS} | self.more
        return {name: self._load_split(name, where, True) for name, where in wanted.items() if where is not None}

    def folder_of(self, split: str) -> Path | None:
        """The folder of the files that a split comes from; None for the hub."""
        where = {**{name: getattr(self, name) for name in SPLITS}, **self.more}[split] or self.train
        if self.dataset is not None and not _is_path(where):
            return Path(self.dataset) if Path(self.dataset).is_dir() else None
        return Path(where) if Path(where).is_dir() else Path(where).parent

    def _load_split(self, name: str, where: str, streaming: bool = False) -> Dataset | IterableDataset:
        try:
            if self.dataset is not None and not _is_path(where):
                return self._named_split(where, streaming)
            if Path(where).is_dir():
                return _read_places(f"{name}={where!r}", [Path(where)], streaming)
            is_file = Path(where).is_file()  # whose name may look like a pattern
            files = [where] if is_file else sorted(glob(where, recursive=True))
            check(bool(files), f"{name}={where!r}: no such file or folder (with no dataset given, it must be a path)")
            return _read_files(f"{name}={where!r}", files, streaming)
        except (OSError, ValueError, DatasetsError, *CUT_SHORT) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{name}={where!r} of dataset={self.dataset!r}: cannot be loaded: {_first_line(error)}"
            ) from error

    def _named_split(self, where: str, streaming: bool) -> Dataset | IterableDataset:
        """A split of ``dataset`` by its name, or parts of splits, such as ``train[:10%]``."""
        assert self.dataset is not None
        names = list(dict.fromkeys(re.findall(r"(?:^|\+)\s*([\w.-]+)", where)))
        if not Path(self.dataset).is_dir() or (streaming and names != [where]):
            return load_dataset(self.dataset, self.config, split=where, streaming=streaming)
        if names == [where]:
            return self._local_split(Path(self.dataset), where, streaming)
        splits = {name: self._local_split(Path(self.dataset), name, streaming) for name in names}
        parts = ReadInstruction.from_spec(where).to_absolute({name: len(split) for name, split in splits.items()})
        return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])

    def _local_split(self, folder: Path, where: str, streaming: bool) -> Dataset | IterableDataset:
        """A split of a folder; files are read as files of their kind are elsewhere."""
        argument = f"dataset={self.dataset!r}"
        splits = local_splits(folder)
        check(not splits or where in splits, f"{argument}: has no split {where!r}; there are {', '.join(splits)}")
        if splits:
            return _read_places(argument, splits[where], streaming)
        marks = "".join(sorted(PATTERN & set(str(folder.resolve()))))
        must = "must have none, or its files be named by train, validation and test"
        check(not marks, f"{argument}: has {marks} in its path, which stand for patterns there; {must}")
        files = load_dataset_builder(str(folder), self.config).config.data_files or {}
        found = sorted(map(str, files.get(where, [])))
        if found and ending_of(found[0]) in ENDINGS:
            return _read_files(argument, found, streaming)
        return load_dataset(str(folder), self.config, split=where, streaming=streaming)


def local_splits(folder: Path) -> dict[str, list[Path]]:
    """The files or folders in ``folder`` that are of each split, by the split's name.

    Folders go before files, as on the hub, unless pictures in them have no classes and files of rows say what they are.
    If neither are named as splits are, all is of training.

    Returns:
        None where a README or metadata says what is what, or there is nothing but further folders.
    """
    readme = folder / "README.md"
    is_configured = readme.is_file() and "data_files" in readme.read_text(errors="replace")
    media = media_in(folder)
    if is_configured or (media and any((folder / name).is_file() for name in DESCRIPTIONS)):
        return {}
    if saved := saved_splits(folder):
        return saved
    inside = sorted(each for each in folder.iterdir() if each.name[0] not in "._")
    # a paragraph does not say what a picture is
    endings = [ending for ending in ENDINGS if media is None or ending != ".txt"]
    rows = [each for each in inside if ending_of(each.name) in endings and each.name not in FILES_TO_IGNORE]
    by_name = {each: split for each in rows if (split := split_in(each.name)) is not None}
    folders = split_folders(folder)
    if folders and not (by_name and media and not has_folders(folders)):
        return folders
    if rows:
        return grouped(by_name) if by_name else {"train": rows}
    return {"train": [folder]} if media is not None and any(map(Path.is_dir, inside)) else {}


def _read_places(argument: str, places: Sequence[Path], streaming: bool) -> Dataset | IterableDataset:
    """The pictures, recordings or rows in ``places``, folders or files, which the user gave by ``argument``."""
    if is_saved(places[0]):
        saved = load_from_disk(str(places[0]))
        return saved.to_iterable_dataset() if streaming else saved
    media = next(filter(None, map(media_in, places)), None)
    if media is not None:
        return read_media(argument, places, media, streaming)
    files = [str(file) for place in places for file in visible(place) if file.name not in FILES_TO_IGNORE]
    readable = [file for file in files if ending_of(file) in ENDINGS]
    if not readable and any(ending_of(file) in ARCHIVES for file in files):
        return read_media(argument, places, "imagefolder", streaming)
    check(
        bool(readable),
        f"{argument}: holds no pictures, no recordings, and no files that end in one of {', '.join(ENDINGS)}",
    )
    return _read_files(argument, readable, streaming)


def _read_files(argument: str, files: list[str], streaming: bool) -> Dataset | IterableDataset:
    """The rows of ``files``, all of one kind, which the user gave by ``argument``."""
    ending = ending_of(files[0])
    check(ending in ENDINGS, f"{argument}: the ending must be one of {', '.join(ENDINGS)}")
    other = next((file for file in files if ending_of(file) != ending), None)
    check(other is None, f"{argument}: all files must end in {ending}, as {files[0]} does, but there is {other}")
    check_not_twice(argument, files)
    if ending in READERS:
        articles = hold_articles(files) if ending == ".txt" else [False] * len(files)
        if streaming:  # each file of a list is a shard, and those of a tuple are read one after another
            reading = {"files": files, "ending": ending, "articles": articles}
            return IterableDataset.from_generator(rows_of, gen_kwargs=reading)
        of_files = {"files": tuple(files), "articles": tuple(articles), "stamps": tuple(stamps(files))}
        return generated(rows_of, ending=ending, **of_files)
    for file in files if BUILDERS[ending] == "json" and not streaming else ():
        check_decodable(file)
        is_empty = all(line.strip() in ("", "[]") for line in lines_of(file))
        check(not is_empty, f"{file}: has no rows; must have one at least")
    try:
        names = [escape(os.path.abspath(file)) for file in files]  # which datasets takes for patterns
        loaded = load_dataset(BUILDERS[ending], data_files=names, split="train", streaming=streaming)
    except (ValueError, DatasetsError) as error:
        faults = (json_fault(file) for file in files) if BUILDERS[ending] == "json" else ()
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is None:
            raise
        raise ConfigError(fault) from error
    if BUILDERS[ending] == "json" and not streaming:
        loaded = in_questions(loaded)
    inner = [name for name, feature in (loaded.features or {}).items() if _is_of_rows(name, feature)]
    check(
        streaming or len(loaded) > 1 or not inner or ending == ".parquet",
        f"{files[0]}: is one object, with rows in {some_of(list(map(repr, inner)))}; must be a list of rows, or a row "
        "a line",
    )
    return loaded


def _is_of_rows(name: str, feature: Any) -> bool:
    """Whether values are lists of records; or values or records by number, as pandas writes tables."""
    if isinstance(feature, dict):
        return name.isdecimal() or all(key.isdecimal() for key in feature)
    return isinstance(feature, List) and isinstance(feature.feature, dict)


def _first_line(error: BaseException) -> str:
    """What the innermost cause of ``error`` says, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_path(where: str) -> bool:
    """Whether ``where`` can only be a path, not the name of a hub dataset's split."""
    return "/" in where or os.sep in where or ending_of(where) in ENDINGS


def check_columns(splits: Mapping[str, Dataset], columns: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` unless every split has the columns; ``columns`` maps argument names to column names."""
    labelled = next((columns[argument] for argument in ("label_column", "labels_column") if argument in columns), None)
    for argument, column in columns.items():
        check(
            column != "labels" or labelled in (None, "labels"),
            f"{argument}={column!r}: is what the labels are kept as; must be renamed",
        )
    for name, split in splits.items():
        for argument, column in columns.items():
            check(
                column in split.column_names,
                f"{argument}={column!r}: not a column of the {name} split, which has {', '.join(split.column_names)}",
            )
