"""What every phase asks of its data: dict batches, a task, and a way to see the data as it is."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.data.output_names import places
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.errors import ConfigError, check

SPLITS = ("train", "validation", "test")


class CacheableLoader(DataLoader):
    """Batches of a dataset; once ``cached`` is set, the batches of that, with no work on the dataset.

    Attributes:
        cached: As many batches as the trainer takes of this loader.
    """

    cached: Iterable[Any] | None = None

    def __iter__(self) -> Any:
        return super().__iter__() if self.cached is None else iter(self.cached)


class TaskData(L.LightningDataModule):
    """Train, validation and test splits of labelled samples, as dict batches with a key ``labels`` ``(B, ...)``.

    There can be further validation and test splits, named ``validation_...`` and ``test_...``; each is a loader.

    Attributes:
        head: The head that a model needs for this data.
        task: What is to be learnt, once set up; its label names are the data's, until a model's take their place.
        ordered: Phases that only gather statistics set this: training samples then come in order and unaugmented.
        preprocessing: How pictures become the model's input, once the processor is loaded; None for anything else.
        sample_length: Tokens that every sample has; None where they differ, and for data of anything but text.

    Args:
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: If ``batch_size`` is not positive or ``num_workers`` is negative.
    """

    head: Head = "classification"
    preprocessing: ImagePreprocessing | None = None
    sample_length: int | None = None

    def __init__(self, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        check(batch_size > 0, f"batch_size={batch_size}: must be positive")
        check(num_workers >= 0, f"num_workers={num_workers}: must not be negative")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.ordered = False
        self.task: Task | None = None
        self._own_task: Task | None = None
        self._outputs: Tensor | None = None  # of the data's classes, where their order is not the data's own
        self._splits: Mapping[str, Dataset] = {}
        self._raw_inputs: list[str] | None = None

    @abstractmethod
    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        """The splits by name, ``train``, ``validation`` and ``test`` among them, and the task."""

    @abstractmethod
    def collate(self, samples: Sequence[Any], augment: bool) -> dict[str, Tensor]:
        """A batch of samples of one split."""

    def training_sampler(self, dataset: Dataset) -> Sampler | None:
        """The order of training samples, this process's share of them; None for an order by chance."""
        return None

    def rearranged(self, dataset: Dataset) -> Dataset:
        """A split to evaluate on, in the order that costs least; predictions and statistics keep the split's own."""
        return dataset

    def load_processor(self) -> None:
        """Load what :meth:`save_processor` writes, where it has to come from a folder or the hub, and check it.

        Not done in ``__init__``, so that a config can be read without a network; but before anything long runs. Doing
        it again does nothing.
        """

    @property
    def augmented(self) -> bool:
        """Whether each epoch sees other training samples, e.g. since they are changed at random."""
        return False

    @property
    def num_token_ids(self) -> int | None:
        """How many token ids the batches may hold, once set up; None for data of anything but text."""
        return None

    def longest_samples(self) -> dict[str, int]:
        """Tokens of the longest sample by split, once set up; none where samples are not texts of their own length."""
        return {}

    @property
    def class_names(self) -> list[str]:
        """Names of the data's own labels, in its own order, once set up."""
        assert self._own_task is not None
        return self._own_task.label_names

    @property
    def num_training_samples(self) -> int:
        """Samples of an epoch, over all processes, once set up."""
        return _size(self._splits["train"])

    def save_processor(self, folder: Path) -> None:
        """Write what turns raw input into model input, a tokenizer or an image processor, into ``folder``."""

    def prepare_data(self) -> None:
        """Download and preprocess once, so that the other processes find it cached."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load all splits.

        Raises:
            ConfigError: If a split is empty.
        """
        if self._splits:
            return
        self.load_processor()
        splits, self._own_task = self.load()
        for name, split in splits.items():
            check(_size(split) > 0, f"{name}: the split is empty; must have at least one sample")
        self._splits, self.task = splits, self._own_task

    def number_labels_as(self, output_names: Sequence[str] | None) -> None:
        """Let batches number classes as a model does that has been trained before.

        Args:
            output_names: Names of the model's outputs, by index; there may be more than the data has classes. None for
                the data's own order.

        Raises:
            ConfigError: If a class of the data is none of the outputs.
        """
        assert self._own_task is not None  # it is set up
        if output_names is None:
            self.task, self._outputs = self._own_task, None
            return
        found = places(self.class_names, output_names)
        check(
            found is not None,
            f"labels: {', '.join(self.class_names[:20])} are not all among {', '.join(output_names[:20])}",
        )
        assert found is not None
        others = [index for index in range(len(output_names)) if index not in set(found)]
        self.task = self._own_task.with_label_names(output_names)
        self._outputs = torch.tensor([*found, *others])

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Samples to predict for, of inputs as they are: texts, or paths of pictures.

        Raises:
            ConfigError: If this data has no such inputs.
        """
        raise ConfigError(f"{type(self).__name__}: predicts for the samples of its own splits only")

    def predict_for(self, inputs: Sequence[str]) -> None:
        """Let ``predict`` run over these inputs instead of the test split."""
        self._raw_inputs = list(inputs)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Let training loaders that are made in the body give samples in order and unaugmented."""
        before, self.ordered = self.ordered, True
        try:
            yield
        finally:
            self.ordered = before

    def split_names(self, stage: str) -> list[str]:
        """The splits that ``stage``, ``validation`` or ``test``, runs over, the one of that name first."""
        return [name for name in sorted(self._splits) if name == stage or name.startswith(f"{stage}_")]

    def train_dataloader(self) -> Any:
        return self._loader("train", train=not self.ordered)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation_loaders("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        if self._raw_inputs is None:
            return self._evaluation_loaders("test", in_order=True)
        return self._loader_of(self.raw_samples(self._raw_inputs), False, None)

    def _evaluation_loaders(self, stage: str, in_order: bool = False) -> DataLoader | list[DataLoader]:
        loaders = [self._loader(name, False, in_order) for name in self.split_names(stage)]
        return loaders if len(loaders) > 1 else loaders[0]

    def _batch(self, samples: Sequence[Any], augment: bool) -> dict[str, Tensor]:
        batch = self.collate(samples, augment)
        if self._outputs is None or "labels" not in batch:
            return batch
        return {**batch, "labels": renumbered(batch["labels"], self._outputs)}

    def _loader(self, split: str, train: bool, in_order: bool = True) -> DataLoader:
        dataset = self._splits[split] if in_order else self.rearranged(self._splits[split])
        sampler = self.training_sampler(dataset) if train else _ordered_sampler(dataset, repeat=split == "train")
        return self._loader_of(dataset, train, sampler)

    def _loader_of(self, dataset: Dataset, train: bool, sampler: Sampler | None) -> DataLoader:
        return CacheableLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=train and sampler is None,
            sampler=sampler,
            collate_fn=partial(self._batch, augment=train),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def renumbered(labels: Tensor, outputs: Tensor) -> Tensor:
    """Labels by the index of a model's output.

    Args:
        labels: Indices ``(B,)`` of the data's classes, or probabilities ``(B, C)`` of these and, behind them, of the
            outputs that the data has no class for.
        outputs: For each of the ``C``, the output's index.
    """
    if not labels.is_floating_point():
        return outputs[labels]
    probabilities = labels.new_zeros(len(labels), len(outputs))
    probabilities[:, outputs[: labels.shape[1]]] = labels
    return probabilities


def _size(split: Any) -> int:
    """Samples of a split; torch's type of a dataset need not have a length, ours have."""
    return len(split)


def _ordered_sampler(dataset: Dataset, repeat: bool) -> DistributedSampler | None:
    """This process's share of ``dataset`` in order, dealt out in turn; None without other processes.

    Lightning's own choice would shuffle training data, and repeat samples in evaluation until processes have equally
    many (``repeat``), which falsifies metrics.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return (DistributedSampler if repeat else UnrepeatedDistributedSampler)(dataset, shuffle=False)
