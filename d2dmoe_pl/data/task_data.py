"""What every phase asks of its data: dict batches, a task, and a way to see the data as it is."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from d2dmoe_pl.data.cacheable_loader import CacheableLoader
from d2dmoe_pl.data.epoch_order import DrawnSamples, EpochOrder, check_shares, even_batch_size, ordered_sampler, seeded
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.data.output_names import places, renumbered
from d2dmoe_pl.data.own_data_checks import SPLITS, check_batch, checked_splits
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.errors import ConfigError, check, some_of


class TaskData(L.LightningDataModule):
    """Train, validation and test splits of labelled samples, as dict batches with a key ``labels`` ``(B, ...)``.

    There can be further validation and test splits, named ``validation_...`` and ``test_...``; each is a loader.

    Attributes:
        head: The head that a model needs for this data.
        task: What is to be learnt, once set up; its label names are the data's, until a model's take their place.
        ordered: Whether training samples come in order and unaugmented, whatever the phase; those that only gather
            statistics get them so anyway.
        preprocessing: How pictures become the model's input, once the processor is loaded; None for anything else.
        answer_start: Where answers are texts, the token that the model begins them with, once there is a model.
        answer_end: The token that ends them, once the tokenizer is loaded.
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
    answer_start: int | None = None
    answer_end: int | None = None
    loaded: ClassVar[Sequence[str]] = SPLITS  # what load must give
    raw_inputs: ClassVar[str | None] = None  # what raw_samples takes: texts, pictures or recordings

    def __init__(self, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        check(batch_size > 0, f"batch_size={batch_size}: must be positive")
        check(num_workers >= 0, f"num_workers={num_workers}: must not be negative")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.ordered = False
        self._seed: int | None = None
        self._running_loader: Any = None  # that a training takes its batches from
        self._resumed: dict[str, Any] | None = None  # the state of such a loader
        self.task: Task | None = None
        self._own_task: Task | None = None
        self._outputs: Tensor | None = None  # of the data's classes, where their order is not the data's own
        self._splits: Mapping[str, Any] = {}  # torch's type of a dataset need not have a length, ours have
        self._raw_inputs: list[str] | None = None

    @abstractmethod
    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        """The splits by name, ``train``, ``validation`` and ``test`` among them, and the task."""

    @abstractmethod
    def collate(self, samples: Sequence[Any], augment: bool) -> dict[str, Tensor]:
        """A batch of samples of one split."""

    def training_order(self, dataset: Any, generator: torch.Generator) -> Sequence[int]:
        """The order of an epoch: the indices of all training samples, over all processes."""
        order: list[int] = torch.randperm(len(dataset), generator=generator).tolist()
        return order

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

    def longest_samples(self) -> dict[tuple[str, str], int]:
        """Tokens, once set up, by the setting that limits them and what they are; none for texts all of one length."""
        return {}

    @property
    def class_names(self) -> list[str]:
        """Names of the data's own labels, in its own order, once set up."""
        assert self._own_task is not None
        return self._own_task.label_names

    @property
    def num_training_samples(self) -> int:
        """Samples of an epoch, over all processes, once set up."""
        return len(self._splits["train"])

    @property
    def num_validation_samples(self) -> int:
        """Samples of the validation split, over all processes, once set up."""
        return len(self._splits["validation"])

    def save_processor(self, folder: Path) -> None:
        """Write what turns raw input into model input, a tokenizer or an image processor, into ``folder``."""

    def prepare_data(self) -> None:
        """Download and preprocess once, so that the other processes find it cached."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load all splits.

        Raises:
            ConfigError: If a split is empty, or, to fit, one to validate on has fewer samples than there are processes.
        """
        if not self._splits:
            self.load_processor()
            self._splits, self._own_task = checked_splits(type(self).__name__, self.load(), self.loaded)
            self.task = self._own_task
        if stage == "fit" and (self.trainer is None or self.trainer.limit_val_batches):
            for name in self.split_names("validation"):  # which may be needed after hours only
                check_shares(len(self._splits[name]), name)

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
            f"labels: {some_of(self.class_names)} are not all among {some_of(output_names)}",
        )
        assert found is not None
        others = [index for index in range(len(output_names)) if index not in set(found)]
        self.task = self._own_task.with_label_names(output_names)
        self._outputs = torch.tensor([*found, *others], device="cpu")  # as batches are; models may be made elsewhere

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Samples to predict for, of inputs as they are: texts, or paths of files.

        Raises:
            ConfigError: If this data has no such inputs.
        """
        raise ConfigError(f"{type(self).__name__}: predicts for the samples of its own splits only")

    def predict_for(self, inputs: Sequence[str]) -> None:
        """Let ``predict`` run over these inputs instead of the test split."""
        self._raw_inputs = list(inputs)

    @property
    def seed(self) -> int:
        """What the order of samples, their augmentation and each training step are drawn from.

        That of the run; if it has none, one by chance, the same on all processes. A training that is resumed keeps it.
        """
        if self._seed is None:
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                shared = [self._seed]
                torch.distributed.broadcast_object_list(shared)
                self._seed = shared[0]
        return self._seed

    def state_dict(self) -> dict[str, Any]:
        loader = self._running_loader
        return {"seed": self.seed, "loader": None if loader is None else loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed = state_dict.get("seed", self._seed)
        self._resumed = state_dict.get("loader")

    @property
    def is_ordered(self) -> bool:
        """Whether training samples come in order and unaugmented: by ``ordered``, or for the phase that is fitted."""
        phase = None if self.trainer is None else self.trainer.lightning_module
        return self.ordered or bool(getattr(phase, "takes_samples_in_order", False))

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
        self._running_loader = self.training_loader()
        if self._resumed is not None:  # by the trainer itself it would come too late for some
            self._running_loader.load_state_dict(self._resumed)
            self._resumed = None
        return self._running_loader

    def training_loader(self) -> Any:
        """A new loader of training samples, with a state that says how far it is."""
        return self._loader("train", train=not self.is_ordered)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation_loaders("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        if self._raw_inputs is None:
            return self._evaluation_loaders("test", in_order=True)
        check_shares(len(self._raw_inputs), "predict")
        return self._loader_of(self.raw_samples(self._raw_inputs), False, None)

    def _evaluation_loaders(self, stage: str, in_order: bool = False) -> DataLoader | list[DataLoader]:
        loaders = [self._loader(name, False, in_order) for name in self.split_names(stage)]
        return loaders if len(loaders) > 1 else loaders[0]

    def drawn_loader(self, split: str, number: int | None = None) -> DataLoader | None:
        """Samples of a split, drawn at random but the same every time, unaugmented: this process's share.

        Args:
            split: Its name.
            number: How many over all processes, in the order that costs least; None for all, in the order drawn.

        Returns:
            None for a split that is streamed.
        """
        if (dataset := self._splits.get(split)) is None:
            return None
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()[:number]
        drawn = dataset.select(order) if hasattr(dataset, "select") else Subset(dataset, order)
        if number is not None:
            drawn = self.rearranged(drawn)
        return self._loader_of(drawn, False, ordered_sampler(drawn, repeat=False))

    def drawn_batch(self, drawn: Sequence[tuple[Any, int]], augment: bool) -> dict[str, Tensor]:
        """A batch of samples, each with the seed of what is random about it."""
        with seeded(drawn[0][1]):
            return self._batch([sample for sample, _ in drawn], augment)

    def _batch(self, samples: Sequence[Any], augment: bool) -> dict[str, Tensor]:
        batch = self.collate(samples, augment)
        assert self._own_task is not None
        check_batch(type(self).__name__, batch, self._own_task, self._raw_inputs is None)
        if self._outputs is None or "labels" not in batch:
            return batch
        return {**batch, "labels": renumbered(batch["labels"], self._outputs)}

    def _loader(self, split: str, train: bool, in_order: bool = True) -> DataLoader:
        dataset: Any = self._splits[split] if in_order else self.rearranged(self._splits[split])
        if not train:
            if split != "train":
                check_shares(len(dataset), split)
            return self._loader_of(dataset, False, ordered_sampler(dataset, repeat=split == "train"))
        return self._loader_of(dataset, True, EpochOrder(dataset, partial(self.training_order, dataset), self.seed))

    def _loader_of(self, dataset: Dataset, train: bool, sampler: Sampler | None) -> DataLoader:
        return CacheableLoader(
            DrawnSamples(dataset) if train else dataset,
            batch_size=even_batch_size(sampler, self.batch_size, getattr(self.trainer, "strategy", None)),
            sampler=sampler,
            collate_fn=partial(self.drawn_batch if train else self._batch, augment=train),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
