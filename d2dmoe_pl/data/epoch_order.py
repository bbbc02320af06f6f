"""Which samples come when in training, and what is drawn at random: a function of a seed, the epoch and the place.

Nothing depends on what was drawn before. So a training that is resumed goes on as one that was never interrupted, and
loader processes change nothing.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Dataset, DistributedSampler, Sampler

from d2dmoe_pl.errors import check


def folded(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**63) that is another for every other ``seed`` or ``parts``, and the same on every machine.

    Example:
        >>> from d2dmoe_pl.data.epoch_order import folded
        >>> folded(0, 1) == folded(0, 1), folded(0, 1) == folded(1, 0)
        (True, False)
    """
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators while the body runs; afterwards they are as they were."""
    with isolate_rng(include_cuda=False):
        seed_generators(seed)
        yield


class Draw(NamedTuple):
    """A sample that is drawn.

    Attributes:
        place: Index of the sample.
        seed: Of all that is random about it.
    """

    place: int
    seed: int


class EpochOrder(DistributedSampler):
    """This process's draws of an epoch, each process the next in turn; some repeat so that all get equally many.

    A ``DistributedSampler`` even with one process, so that a trainer leaves it in place and tells it the epoch.

    Attributes:
        start: Draws that the next iteration leaves out, and with it is 0 again.

    Args:
        dataset: The split.
        order: From a generator to the indices of all samples, over all processes.
        seed: Of the run.
    """

    def __init__(self, dataset: Dataset, order: Callable[[torch.Generator], Sequence[int]], seed: int) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        alone: dict[str, Any] = {} if distributed else {"num_replicas": 1, "rank": 0}
        super().__init__(dataset, seed=seed, **alone)
        self.order = order
        self.start = 0

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(folded(self.seed, self.epoch))
        order = self.order(generator)
        start, self.start = self.start, 0
        places = range(self.rank + start * self.num_replicas, self.total_size, self.num_replicas)
        repeated = list(islice(cycle(order), self.total_size))
        for place in places:
            yield Draw(repeated[place], folded(self.seed, self.epoch, place))


class DrawnSamples(Dataset):
    """The samples of a split by draw: ``(sample, seed)``.

    Args:
        dataset: The split.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: Sequence[Draw | int]) -> list[tuple[Any, int]]:
        # a trainer that is to overfit puts a sampler of its own in the place of ours
        pairs = [draw if isinstance(draw, Draw) else Draw(draw, draw) for draw in draws]
        at_once = getattr(self.dataset, "__getitems__", None)
        indices = [pair.place for pair in pairs]
        samples = at_once(indices) if at_once else [self.dataset[index] for index in indices]
        return [(sample, pair.seed) for sample, pair in zip(samples, pairs, strict=True)]


def ordered_sampler(dataset: Dataset, repeat: bool) -> DistributedSampler | None:
    """This process's share of ``dataset`` in order, dealt out in turn; None without other processes.

    Lightning's own choice would shuffle training data, and repeat samples in evaluation until processes have equally
    many (``repeat``), which falsifies metrics.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return (DistributedSampler if repeat else UnrepeatedDistributedSampler)(dataset, shuffle=False)


def check_shares(number: int, said: str) -> None:
    """Raise ``ConfigError``, in every process alike, unless there is a sample for each of them.

    Args:
        number: Of samples, over all processes.
        said: What they come from: a split, or a setting and its value.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    check(number >= processes, f"{said}: {number} samples for {processes} processes; must be at least one for each")


def even_batch_size(sampler: Sampler | None, batch_size: int, strategy: Strategy | None) -> int:
    """``batch_size``; of a model that is parted among processes, one near it of which all have equally many batches.

    Such a model runs only when all of them run it. A larger size is taken only where no smaller one will do.

    Args:
        sampler: Of the split.
        batch_size: As the user set it.
        strategy: Of the trainer, if there is one.
    """
    is_parted = isinstance(strategy, (ModelParallelStrategy, FSDPStrategy))
    if not (is_parted and isinstance(sampler, UnrepeatedDistributedSampler)):
        return batch_size
    fewest, more = divmod(len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type] # ours have a length
    if more == 0 or fewest == 0:
        return batch_size
    # some processes have a sample more, which must not be alone in a batch
    return next(size for size in (*range(batch_size, 1, -1), *range(2, fewest + 2)) if fewest % size)
