"""Splits of several FFNs, by several processes where one after the other would take long."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from joblib import Parallel, cpu_count, delayed
from torch import Tensor

LONG = 20.0
"""Seconds: that much work is worth the start of other processes, each of which imports PyTorch."""


def split_each(
    split: Callable[..., Tensor],
    arguments: Iterable[tuple[Any, ...]],
    number: int,
    long: float = LONG,
    processes: int | None = None,
) -> Iterator[Tensor]:
    """What ``split`` gives for each of ``arguments``, so many in ``number``, in their order.

    The first is done here. Where its time says that the rest would take ``long`` seconds or more, as many processes as
    there are processors (or ``processes``) do that; what is given does not depend on it.
    """
    start = time.monotonic()
    rest = iter(arguments)
    yield split(*next(rest))
    processes = min(number - 1, processes or cpu_count())
    if processes > 1 and (time.monotonic() - start) * (number - 1) >= long:
        yield from Parallel(processes, return_as="generator")(delayed(split)(*own) for own in rest)
    else:
        yield from (split(*own) for own in rest)
