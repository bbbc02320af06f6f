"""Whether the type that a trainer computes in is one that the CPU at hand is slow in."""

import functools
import time
from itertools import pairwise

import lightning as L
import torch

from d2dmoe_pl.notices import notice

SLOW = 2.0
"""How many times as long products in bfloat16 must take as in float32 for it to be said."""


@functools.cache
def bfloat16_slowdown() -> float:
    """How many times as long a product takes in bfloat16 as in float32 on this CPU, measured once a process.

    Below 1 where there are instructions for bfloat16, about 8 with AVX2 alone.
    """
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(rows, 768, dtype=dtype, device="cpu") for rows in (64, 768))
        ends = [time.perf_counter()]
        for _ in range(4):
            torch.nn.functional.linear(a, b)
            ends.append(time.perf_counter())
        times[dtype] = min(end - start for start, end in pairwise(ends))
    return times[torch.bfloat16] / times[torch.float32]


def say_if_slow(trainer: L.Trainer) -> None:
    """Say it where ``trainer`` computes in bfloat16 on a CPU that takes much longer so; once a process."""
    is_on_cpu = trainer.strategy.root_device.type == "cpu"
    if is_on_cpu and str(trainer.precision).startswith("bf16") and bfloat16_slowdown() >= SLOW:
        _say(str(trainer.precision), f"{bfloat16_slowdown():.1f}")


@functools.cache
def _say(precision: str, times: str) -> None:
    notice(
        f"precision={precision}: products in bfloat16 take {times} times as long as in float32 on this CPU; "
        "trainer.precision=32-true is faster here."
    )
