"""What a data module gives, held to what phases ask of it, so that one of a user's own is told where it goes wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.errors import check, said_of

SPLITS = ("train", "validation", "test")


def checked_splits(name: str, loaded: Any, needed: Sequence[str]) -> tuple[Mapping[str, Any], Task]:
    """What the method ``load`` of the data ``name`` gave, as it is, the splits ``needed`` among it.

    Raises:
        ConfigError: If it is no pair of splits and a task, a split is missing, a stream or empty.
    """
    is_pair = isinstance(loaded, tuple) and len(loaded) == 2
    check(
        is_pair and isinstance(loaded[0], Mapping) and isinstance(loaded[1], Task),
        f"{name}: load must give the splits by name, and a task",
    )
    splits, task = loaded
    missing = ", ".join(split for split in needed if split not in splits)
    check(not missing, f"{name}: load gave no {missing}; must give {', '.join(needed)}")
    for split, dataset in splits.items():
        is_indexed = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        check(is_indexed, f"{name}: {split} is a stream; must have a length, and samples by index")
        check(len(dataset) > 0, f"{split}: the split is empty; must have at least one sample")
    return splits, task


def check_batch(name: str, batch: Any, task: Task, is_labelled: bool) -> None:
    """Raise ``ConfigError`` for a batch of the data ``name`` that phases cannot take.

    Args:
        name: The data's class.
        batch: What its method ``collate`` gave.
        task: The data's own.
        is_labelled: Whether it must have labels.
    """
    check(isinstance(batch, dict), f"{name}: collate gave a {type(batch).__name__}; must give a dict of tensors")
    for key, value in batch.items():
        check(isinstance(value, Tensor), f"{name}: collate gave {key} as {said_of(value)}; must be a tensor")
    labels = batch.get("labels")
    if labels is None:
        check(not is_labelled, f"{name}: collate gave no labels; must give them under this key")
        return
    if not isinstance(task, Classification):
        return
    classes = task.num_outputs
    is_mixed = labels.is_floating_point() and labels.shape[1:] == (classes,)  # as those of mixed images are
    check(
        is_mixed or (labels.dim() == 1 and labels.dtype in (torch.int64, torch.uint8)),
        f"{name}: collate gave labels of {said_of(labels)}; must be torch.int64 (B,), or probabilities (B, {classes})",
    )
    if not is_mixed:
        low, high = (int(value) for value in labels.aminmax())
        check(
            low >= 0 and high < classes,
            f"{name}: collate gave labels from {low} to {high}; must lie in [0, {classes}), the classes of the task",
        )
