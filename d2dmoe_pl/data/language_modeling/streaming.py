"""Blocks of tokens from documents that are read as they are needed: dealt to processes, and resumable."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from d2dmoe_pl.data.epoch_order import folded
from d2dmoe_pl.data.language_modeling.packing import Packer
from d2dmoe_pl.errors import check
from d2dmoe_pl.notices import notice

DOCUMENTS_AT_ONCE = 100  # read and tokenised in one call


def deal(num_shards: int, reader: int, num_readers: int) -> tuple[list[int], int, int]:
    """What one of several readers reads: every document is read by one, a shard by as few as can be.

    Args:
        num_shards: Shards of the stream.
        reader: Which reader, from 0.
        num_readers: How many read at the same time.

    Returns:
        The shards; and of the documents in these, which to take: number ``part`` of every ``parts``.
    """
    if num_shards >= num_readers:
        return list(range(reader, num_shards, num_readers)), 0, 1
    shard = reader % num_shards
    return [shard], reader // num_shards, len(range(shard, num_readers, num_shards))


def documents(
    stream: datasets.IterableDataset, column: str, skipped: int = 0, reader: int = 0, num_readers: int = 1
) -> Iterator[list[str]]:
    """Batches of texts: the share of one reader.

    Args:
        stream: Any number of shards; a file is one.
        column: Of the texts.
        skipped: Documents at the head of the first shard that no reader gets.
        reader: Which reader, from 0.
        num_readers: How many read at the same time.
    """
    shards, part, parts = deal(stream.num_shards, reader, num_readers)
    for shard in shards:
        texts = stream.shard(stream.num_shards, shard)
        if shard == 0:
            texts = texts.skip(skipped)
        # batches of it are not dealt to loader workers once more, as single documents would be
        for batch in texts.iter(DOCUMENTS_AT_ONCE * parts):
            yield batch[column][part::parts]


def head(stream: datasets.IterableDataset, column: str, number: int) -> list[str]:
    """The first ``number`` texts of a stream, or all that it has."""
    return list(islice((text for texts in documents(stream, column) for text in texts), number))


class PackedStream(IterableDataset):
    """The blocks of a stream that fall to this process and loader worker, ``input_ids`` ``(L,)`` each, with its seed.

    Args:
        stream: The documents.
        column: Of the texts.
        skipped: Documents at the head of the first shard that are not used.
        packer: Makes the blocks.
        rank: Of this process.
        num_processes: How many share the stream.
        seed: Of the run.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        column: str,
        skipped: int,
        packer: Packer,
        rank: int,
        num_processes: int,
        seed: int,
    ) -> None:
        self.stream = stream
        self.column = column
        self.skipped = skipped
        self.packer = packer
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        reader, num_readers = number * self.num_processes + self.rank, self.num_processes * workers
        texts = documents(self.stream, self.column, self.skipped, reader, num_readers)
        for place, block in enumerate(self.packer.blocks(self._noticed(texts))):
            yield {"input_ids": torch.tensor(block)}, folded(self.seed, reader, place)

    def _noticed(self, texts: Iterator[list[str]]) -> Iterator[list[str]]:
        """Missing ones are left out, since a long training may meet some; but not without a word."""
        said = False
        for batch in texts:
            if None in batch and not said:
                where = f"text_column={self.column!r}"
                notice(f"{where}: a document of the training stream has no text; such are left out.")
                said = True
            yield batch


class StreamLoader:
    """Batches of a stream, an epoch at a time; an epoch goes on where the one before ended.

    Its state is the number of batches that it gave, the same in every process. Resuming reads and drops as many, so
    that what follows is what would have followed.

    Args:
        loader: All batches of the stream, those of this process.
        batches: How many make an epoch.
        num_processes: How many share the stream.
    """

    def __init__(self, loader: DataLoader, batches: int, num_processes: int) -> None:
        self.loader = loader
        self.batches = batches
        self._dealt = {"processes": num_processes, "workers": loader.num_workers, "batch_size": loader.batch_size}
        self._given = 0
        self._running: Iterator | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        if self._running is None:
            self._running = iter(self.loader)
            for _ in range(self._given):
                next(self._running, None)
        for left in range(self.batches, 0, -1):
            batch = next(self._running, None)
            check(
                batch is not None,
                f"source: the training stream ended after {self._given} batches in this process, with {left} of the "
                f"epoch's {self.batches} to come; must be longer, or read for less (trainer.max_steps, "
                "trainer.max_epochs, epoch_blocks)",
            )
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How far the stream is read."""
        return {"given": self._given, **self._dealt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If the stream is dealt out otherwise by now, so that the place is not known.
        """
        for key, value in self._dealt.items():
            check(
                state[key] == value,
                f"{key}={value}: a stream can be resumed only as it was begun, with {key}={state[key]}",
            )
        self._given = state["given"]
