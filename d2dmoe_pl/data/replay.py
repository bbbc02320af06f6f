"""A loader whose later epochs can come from elsewhere."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader


class ReplayLoader(DataLoader):
    """Batches of a dataset; once ``replay`` is set, the batches of that, with no work on the dataset.

    Attributes:
        replay: As many batches as the trainer takes of this loader.
    """

    replay: Iterable[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.replay is None else iter(self.replay)
