"""Splits of any Hugging Face dataset, on the hub or in local files, loaded whole or streamed; and their labels."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from datasets import ClassLabel, Dataset, IterableDataset, load_dataset

from d2dmoe_pl.data.task_data import SPLITS
from d2dmoe_pl.errors import ConfigError, check

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
OPTIONS = {".tsv": {"sep": "\t"}, ".txt": {"sample_by": "paragraph"}}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass
class DatasetSource:
    """Where the splits of a dataset are.

    Attributes:
        dataset: Hub name, or a folder laid out as the hub expects (``train.csv``, ``test.parquet``, image folders);
            None if ``train``, ``validation`` and ``test`` are all paths.
        config: Name of the hub dataset's configuration.
        train: Name of the training split of ``dataset``; or, with a ``/`` or the ending of a file in it, a path: a
            local CSV, TSV, JSON (lines), Parquet or text file, whose paragraphs are samples with the column ``text``; a
            pattern for several files (``data/*.json.gz``); or an image folder. A path needs no ``dataset``, and where
            there is one, is read instead of it.
        validation: The same for validation; None to hold out part of the training split.
        test: The same for test; None to hold out part of the training split.
        more: Further splits to evaluate on, by names that begin with ``validation_`` or ``test_``; each as above.
        held_out: Share of the training split for each split that is held out of it.
        seed: Decides which samples are held out.
    """

    dataset: str | None = None
    config: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"
    more: dict[str, str] = field(default_factory=dict)
    held_out: float = 0.1
    seed: int = 0

    def load(self) -> dict[str, Dataset]:
        """The splits by name: ``train``, ``validation``, ``test`` and those in ``more``.

        Raises:
            ConfigError: If a split cannot be loaded; the message says which and why.
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
                parts = splits["train"].train_test_split(self.held_out, seed=self.seed)
                splits |= {"train": parts["train"], name: parts["test"]}
        return splits

    def stream(self) -> dict[str, IterableDataset]:
        """The splits by name, but those that are None, to be read as they are iterated; a file is a shard.

        Raises:
            ConfigError: If a split cannot be found; the message says which and why.
        """
        wanted = {name: getattr(self, name) for name in SPLITS} | self.more
        return {name: self._load_split(name, where, True) for name, where in wanted.items() if where is not None}

    def _load_split(self, name: str, where: str, streaming: bool = False) -> Dataset | IterableDataset:
        try:
            if self.dataset is not None and not _is_path(where):
                return load_dataset(self.dataset, self.config, split=where, streaming=streaming)
            if Path(where).is_dir():
                return load_dataset("imagefolder", data_dir=where, split="train", streaming=streaming)
            files = sorted(glob(where))
            check(bool(files), f"{name}={where!r}: no such file or folder (with no dataset given, it must be a path)")
            ending = _ending(files[0])
            check(ending in BUILDERS, f"{name}={where!r}: the ending must be one of {', '.join(BUILDERS)}")
            options = OPTIONS.get(ending, {})
            return load_dataset(BUILDERS[ending], data_files=files, split="train", streaming=streaming, **options)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{name}={where!r} of dataset={self.dataset!r}: cannot be loaded: {reason}") from error


def _ending(path: str) -> str:
    """The last ending of ``path`` that is not a compression's; empty if there is none."""
    endings = [ending for ending in Path(path).suffixes if ending not in COMPRESSIONS]
    return endings[-1] if endings else ""


def _is_path(where: str) -> bool:
    """Whether ``where`` can only be a path, not the name of a hub dataset's split."""
    return "/" in where or os.sep in where or _ending(where) in BUILDERS


def check_columns(splits: Mapping[str, Dataset], columns: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` unless every split has the columns; ``columns`` maps argument names to column names."""
    for name, split in splits.items():
        for argument, column in columns.items():
            check(
                column in split.column_names,
                f"{argument}={column!r}: not a column of the {name} split, which has {', '.join(split.column_names)}",
            )


def encode_labels(splits: Mapping[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """Replace the label column, of strings, integers or ``ClassLabel``, by ``labels``, indices from 0.

    Args:
        splits: Datasets by split name, ``train`` among them; classes are those of the training split.
        column: Name of the label column.

    Returns:
        The splits, and the classes' names by index.

    Raises:
        ConfigError: If another split has a label that the training split has not.
    """
    feature = splits["train"].features[column]
    seen = range(feature.num_classes) if isinstance(feature, ClassLabel) else sorted(set(splits["train"][column]))
    index = {label: i for i, label in enumerate(seen)}
    names = feature.names if isinstance(feature, ClassLabel) else [str(label) for label in seen]
    encoded = {}
    for name, split in splits.items():
        labels = split[column]
        unseen = sorted({str(label) for label in labels if label not in index})
        check(
            not unseen,
            f"{column}: the {name} split has labels unseen in training: {', '.join(unseen[:5])}; "
            f"allowed are {', '.join(names[:20])}",
        )
        encoded[name] = split.remove_columns(column).add_column("labels", [index[label] for label in labels])
    return encoded, names
