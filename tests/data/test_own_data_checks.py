"""What a data module of a user's own gives, and what is said where phases cannot take it."""

import pytest
import torch
from torch.utils.data import IterableDataset

from d2dmoe_pl.data import Digits
from d2dmoe_pl.data.own_data_checks import check_batch
from d2dmoe_pl.data.task import Classification, Regression
from d2dmoe_pl.errors import ConfigError

THREE = Classification(["ant", "bee", "cat"])


class OwnData(Digits):
    """Digits, of which ``changed`` makes something else."""

    def __init__(self, changed):
        super().__init__()
        self.changed = changed

    def load(self):
        return self.changed(*super().load())


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda splits, task: splits, "load must give the splits by name, and a task"),
        (lambda splits, task: (splits, None), "load must give the splits by name, and a task"),
        (
            lambda splits, task: ({"train": splits["train"], "val": splits["validation"]}, task),
            "load gave no validation, test; must give train, validation, test",
        ),
        (
            lambda splits, task: ({**splits, "train": Stream()}, task),
            "train is a stream; must have a length, and samples by index",
        ),
    ],
)
def test_splits_that_are_none(changed, said):
    with pytest.raises(ConfigError) as refused:
        OwnData(changed).setup()
    assert str(refused.value) == f"OwnData: {said}"


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((torch.zeros(2), torch.zeros(2)), "collate gave a tuple; must give a dict of tensors"),
        ({"labels": torch.tensor([0, 2]), "names": ["a", "b"]}, "collate gave names as list; must be a tensor"),
        ({"pixel_values": torch.zeros(2)}, "collate gave no labels; must give them under this key"),
        (
            {"labels": torch.tensor([0.0, 2.0])},
            "collate gave labels of torch.float32 of shape (2,) on cpu; must be torch.int64 (B,), or probabilities "
            "(B, 3)",
        ),
        (
            {"labels": torch.tensor([[0], [2]])},
            "collate gave labels of torch.int64 of shape (2, 1) on cpu; must be torch.int64 (B,), or probabilities "
            "(B, 3)",
        ),
        (
            {"labels": torch.tensor([1, 3])},
            "collate gave labels from 1 to 3; must lie in [0, 3), the classes of the task",
        ),
    ],
)
def test_batches_that_phases_cannot_take(batch, said):
    with pytest.raises(ConfigError) as refused:
        check_batch("OwnData", batch, THREE, True)
    assert str(refused.value) == f"OwnData: {said}"


def test_batches_that_they_can():
    check_batch("OwnData", {"labels": torch.tensor([0, 2])}, THREE, True)
    check_batch("OwnData", {"labels": torch.rand(2, 3)}, THREE, True)
    check_batch("OwnData", {"pixel_values": torch.zeros(2)}, THREE, False)
    check_batch("OwnData", {"labels": torch.rand(2)}, Regression("price"), True)


def test_a_batch_is_looked_at_before_anything_is_trained():
    class Named(Digits):
        def collate(self, samples, augment):
            return {**super().collate(samples, augment), "names": ["one"] * len(samples)}

    data = Named()
    data.setup()
    with pytest.raises(ConfigError, match=r"^Named: collate gave names as list; must be a tensor$"):
        next(iter(data.val_dataloader()))
