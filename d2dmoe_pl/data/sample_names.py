"""What errors call the samples of a split: by the row where the user finds them."""

from collections.abc import Sequence

from datasets import Dataset

SAMPLE = "_d2dmoe_sample"  # a column that keeps the names, where rows are about to be no longer those of a file


def sample_names(split: Dataset, name: str) -> Sequence[str]:
    """The name of each sample of the split called ``name``: its number, from 1, and where that counts.

    In a split that is held out of the training split, and in what is left of that, it counts in the training split as
    it was loaded.
    """
    if SAMPLE in split.column_names:
        return list(split[SAMPLE])
    kept = split._indices  # of a part of a dataset, which rows of the whole it has
    rows = range(len(split)) if kept is None else kept.column(0).to_pylist()
    counted = name if kept is None else "train"
    return [f"sample {row + 1} of the {counted} split" for row in rows]
