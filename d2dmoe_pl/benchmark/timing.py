"""How long calls take, measured in turn, so that whatever slows the machine down slows all of them down."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

# the calls of one sample take at least this long, seconds: the clock's own cost is then well below 1%
SAMPLE = 0.01
# half the interquartile range over the median, above which a difference is no longer trusted
NOISE_BOUND = 0.1
FEWEST = 5  # rounds, of which quartiles still say something


@dataclass(frozen=True)
class Contender:
    """One of the things that are timed.

    Attributes:
        call: What is timed.
        setting: A context, outside the clock, in which it is called.
        parts: How many equal things one call does; times are of one of them.
    """

    call: Callable[[], object]
    setting: Callable[[], AbstractContextManager] = nullcontext
    parts: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: Over the rounds.
        spread: Half the interquartile range over the rounds.
    """

    median: float
    spread: float

    @property
    def is_noisy(self) -> bool:
        """Whether the spread is above ``NOISE_BOUND`` of the median."""
        return self.spread > NOISE_BOUND * self.median


def summarise(seconds: Sequence[float]) -> Timing:
    """Median and half the interquartile range of at least two times."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, (upper - lower) / 2)


@torch.no_grad()
def alternate(
    contenders: Mapping[str, Contender],
    rounds: int,
    device: torch.device,
    at_most: float = math.inf,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Time the contenders in turn: the first, the second, ..., the first again, ``rounds`` times.

    Args:
        contenders: By name, in the order of a round. Each is called twice before, to warm up.
        rounds: Samples of each. A sample is the mean of as many calls as fill ``SAMPLE`` seconds.
        device: Whose queue is waited for, before the clock starts and before it stops.
        at_most: Seconds that all rounds may take; for slow contenders there are fewer, but ``FEWEST``.
        pause: Seconds of silence before each sample, in which threads of the one before fall asleep.
    """
    for contender in contenders.values():
        _seconds(contender, 1, device)  # the first call may compile
    once = {name: _seconds(contender, 1, device) for name, contender in contenders.items()}
    calls = {name: max(1, math.ceil(SAMPLE / seconds / contenders[name].parts)) for name, seconds in once.items()}
    of_round = sum(seconds * calls[name] * contenders[name].parts for name, seconds in once.items())
    fewer = rounds if of_round * rounds <= at_most else max(FEWEST, int(at_most / of_round))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(min(rounds, fewer)):
        for name, contender in contenders.items():
            time.sleep(pause)
            samples[name].append(_seconds(contender, calls[name], device))
    return {name: summarise(seconds) for name, seconds in samples.items()}


def _seconds(contender: Contender, calls: int, device: torch.device) -> float:
    """Mean seconds of a call, or of one of its parts."""
    with contender.setting():
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            contender.call()
        _wait(device)
        return (time.perf_counter() - start) / calls / contender.parts


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def peak_memory(contender: Contender, device: torch.device) -> int:
    """Bytes that one call holds at its peak beyond what was held before it, its result among them.

    Counts what goes through PyTorch's allocators, the work space of compiled operators too.
    """
    with contender.setting():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            contender.call()
            return torch.cuda.max_memory_allocated(device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log, onto standard error
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            contender.call()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(accumulate(changes, initial=0))
