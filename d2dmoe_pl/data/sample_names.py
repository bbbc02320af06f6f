"""What errors call the samples of a split: by the row where the user finds them."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from datasets import Audio, Dataset, Image

SAMPLE = "_d2dmoe_sample"  # a column that keeps the names, where rows are about to be no longer those of a file


def sample_names(split: Dataset, name: str) -> Sequence[str]:
    """The name of each sample of the split called ``name``: its number, from 1, and where that counts.

    In a split that is held out of the training split, and in what is left of that, it counts in the training split as
    it was loaded.
    """
    if SAMPLE in split.column_names:
        return list(split[SAMPLE])
    kept = split._indices  # of a part of a dataset, which rows of the whole it has
    if kept is None:
        return _Names(range(len(split)), name)
    return _Names(kept.column(0).to_numpy(), "train")


def sample_numbers(split: Dataset) -> list[int]:
    """The same numbers alone."""
    kept = split._indices
    return list(range(1, len(split) + 1)) if kept is None else [row + 1 for row in kept.column(0).to_pylist()]


def numbers_of(data: Any, split: str) -> Iterable[int]:
    """The numbers of the samples of a split of ``data``, where it knows them from its source; else from 1 on."""
    return getattr(getattr(data, "source", None), "held_out_numbers", {}).get(split) or count(1)


def file_names(split: Any) -> list[str | None]:
    """The paths of a split's pictures or recordings, as far as they have some; none for other samples.

    Args:
        split: A dataset, with its files undecoded.
    """
    features = (split.features or {}) if isinstance(split, Dataset) else {}
    column = next((name for name, feature in features.items() if isinstance(feature, Image | Audio)), None)
    if column is None:
        return []
    batches = split.select_columns(column).with_format("arrow").iter(batch_size=1000)  # bytes of all may not fit
    return [path for batch in batches for path in batch[column].combine_chunks().field("path").to_pylist()]


class _Names(Sequence[str]):
    """Made as they are asked for: a large split would have as many texts of them.

    Args:
        rows: Where samples are, from 0.
        split: In which split.
    """

    def __init__(self, rows: Any, split: str) -> None:
        self._rows = rows
        self._split = split

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Names(self._rows[index], self._split)
        return f"sample {self._rows[index] + 1} of the {self._split} split"
