"""Parts of the training split that are held out of it, for validation or a test."""

import numpy as np
from datasets import Dataset

from d2dmoe_pl.errors import ConfigError, check


def held_out(train: Dataset, name: str, share: float, seed: int, together: str | None = None) -> dict[str, Dataset]:
    """What is left of ``train``, and a share of its rows as the split ``name``.

    Args:
        train: The rows.
        name: Of the split.
        share: Of the rows that it gets.
        seed: Decides which.
        together: Column of which rows that are alike go to one split, such as questions about one text; then the split
            has about its share. None if each row may go anywhere.

    Raises:
        ConfigError: If there are too few rows, or too few that differ in ``together``.
    """
    if together is not None and together in train.column_names:
        return _held_out_together(train, name, share, seed, together)
    try:
        parts = train.train_test_split(share, seed=seed)
    except ValueError as error:
        raise ConfigError(
            f"{name}=None: is held out of the train split, whose {len(train)} samples are too few for the share "
            f"held_out={share}"
        ) from error
    return {"train": parts["train"], name: parts["test"]}


def _held_out_together(train: Dataset, name: str, share: float, seed: int, column: str) -> dict[str, Dataset]:
    values = [str(value) for value in train[column]]  # whatever they are: those that may not be are refused later
    _, groups, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    number = int(np.searchsorted(np.cumsum(sizes[order]), share * len(train))) + 1  # of groups, as few as are enough
    check(
        number < len(sizes),
        f"{name}=None: is held out of the train split, whose {len(sizes)} different values in {column!r} are too few "
        f"for the share held_out={share}",
    )
    is_held_out = np.isin(groups, order[:number])
    return {"train": train.select(np.flatnonzero(~is_held_out)), name: train.select(np.flatnonzero(is_held_out))}
