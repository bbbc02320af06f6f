"""Rows of numbers that are written once and then drawn in a new order each epoch, from memory and from disk."""

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from typing import BinaryIO

import torch
from torch import Tensor

_PARTS = 32  # that the memory is filled in


class RowCache:
    """The rows of an epoch's batches, which are then given shuffled, in as many batches.

    Rows that do not fit into the memory lie in a file that has no name on POSIX systems, and so is gone with the
    process, however that ends.

    Attributes:
        added: Batches so far.
        memory: Bytes of rows held in memory; a sixteenth of the limit can be on its way there besides.
        disk: Bytes of rows in the file.

    Args:
        num_batches: Of an epoch.
        max_memory: Bytes.
        folder: Where there is room for the file.
    """

    def __init__(self, num_batches: int, max_memory: int, folder: str) -> None:
        self.num_batches = num_batches
        self.max_memory = max_memory
        self.folder = folder
        self.added = 0
        self.memory = 0
        self.disk = 0
        self._waiting: list[Tensor] = []
        self._blocks: list[Tensor] = []
        self._file: BinaryIO | None = None

    def add(self, rows: Tensor) -> None:
        """Take in a batch, ``(n, width)``; of the same type and width each time.

        Raises:
            OSError: If the rest is likely to take more than half of the disk's free space; or if it cannot be written.
        """
        self.added += 1
        self._waiting.append(rows)
        if sum(each.nbytes for each in self._waiting) >= self.max_memory // _PARTS:
            self._store()

    def complete(self) -> None:
        """Make the rows ready to be drawn, once all are added."""
        if self._waiting:
            self._store()
        if self._file is not None:
            self._file.flush()
            # read only, but torch wants to be able to write
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._blocks.append(torch.frombuffer(mapped, dtype=self._dtype).view(-1, self._width))

    def shuffled(self, seed: int) -> Iterator[Tensor]:
        """All rows in the order of ``seed``, ``(n, width)`` a batch."""
        ends = torch.tensor(list(accumulate(len(block) for block in self._blocks)))
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randperm(int(ends[-1]), generator=generator).tensor_split(self.num_batches):
            yield self._rows(index.sort().values, ends)

    def _rows(self, index: Tensor, ends: Tensor) -> Tensor:
        """The rows of an ascending ``index``, ``(n,)``: ``(n, width)``. Blocks end before rows ``ends``."""
        rows = torch.empty(len(index), self._width, dtype=self._dtype)
        first = start = 0
        for block, last in zip(self._blocks, torch.searchsorted(index, ends).tolist(), strict=True):
            torch.index_select(block, 0, index[first:last] - start, out=rows[first:last])
            first, start = last, start + len(block)
        return rows

    def _store(self) -> None:
        block = torch.cat(self._waiting)
        self._waiting.clear()
        self._width, self._dtype = block.shape[1], block.dtype
        if self._file is None and self.memory + block.nbytes <= self.max_memory:
            self._blocks.append(block)
            self.memory += block.nbytes
            return
        if self._file is None:
            self._check_room(block)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (open as long as the cache is)
        self._file.write(block.view(torch.uint8).numpy().data)
        self.disk += block.nbytes

    def _check_room(self, block: Tensor) -> None:
        os.makedirs(self.folder, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        needed = (self.memory + block.nbytes) * self.num_batches // self.added - self.memory
        if needed > free // 2:
            message = f"about {needed >> 20} MiB are needed, and half of the {free >> 20} MiB free can be taken"
            raise OSError(errno.ENOSPC, message, self.folder)
