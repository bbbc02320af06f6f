"""Batches that can be gone on from in the middle of an epoch, and given from elsewhere once they are known."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from d2dmoe_pl.data.epoch_order import EpochOrder


class CacheableLoader(DataLoader):
    """Batches of a dataset; once ``cached`` is set, the batches of that, with no work on the dataset.

    Its state is the place in the epoch, so that a training goes on in the middle of one.

    Attributes:
        cached: From the number of an epoch to its batches, as many as the trainer takes of this loader.
    """

    cached: Callable[[int], Iterator[Any]] | None = None
    _epoch = 0
    _given = 0
    _resumed: tuple[int, int] | None = None  # an epoch, and batches of it that are done

    @property
    def epoch(self) -> int:
        """The number of the epoch that comes next, or runs."""
        return int(getattr(self.sampler, "epoch", 0))

    def __iter__(self) -> Any:  # not before the first batch is asked for is the epoch known, or whether it is cached
        self._epoch, self._given = self.epoch, 0
        if self._resumed is not None:
            epoch, given = self._resumed
            self._resumed = None
            self._given = given if epoch == self._epoch else 0  # an epoch that was done is followed by a whole one
        yield from self._counted(self.batches_from(self._given))

    @property
    def done_of_first_epoch(self) -> int:
        """Batches of the first epoch that were done before a resumption."""
        if self._resumed is None:
            return 0
        epoch, given = self._resumed
        return len(self) if epoch > 0 else given

    def batches_of(self, epoch: int) -> Iterator[Any]:
        """All batches of an epoch, whichever comes next."""
        if isinstance(self.sampler, EpochOrder):
            self.sampler.set_epoch(epoch)
        return self.batches_from(0)

    def batches_from(self, first: int) -> Iterator[Any]:
        """The batches of the epoch from number ``first`` on."""
        if self.cached is not None:
            return islice(self.cached(self.epoch), first, None)
        if isinstance(self.sampler, EpochOrder):
            self.sampler.start = first * (self.batch_size or 1)
            first = 0
        return islice(super().__iter__(), first, None)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How far the epoch is."""
        return {"epoch": self._epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state."""
        self._resumed = state["epoch"], state["given"]
