"""The fastest of several ways to run the same experts on a GPU, by a measurement on first use."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from d2dmoe_pl.moe.experts.experts import Experts


def fastest(
    ways: Iterable[str],
    run: Callable[[str], object],
    experts: Experts,
    tokens: Tensor,
    milliseconds: Callable[[Callable[[], object]], float],
) -> str:
    """The fastest of ``ways`` for so many tokens; "" where there is none yet, and a call cannot be timed, or none fits.

    It is kept with the experts, for each type and power of two of tokens, until ``set_tau_`` or ``set_backend_``: how
    much there is to save depends on how many experts run.

    Args:
        ways: To choose from.
        run: Runs the experts one way.
        experts: That are run.
        tokens: ``(N, d_model)``.
        milliseconds: Times a call, which has been made once before.
    """
    if torch.compiler.is_compiling():
        return ""
    shape = (tokens.dtype, tokens.device, tokens.shape[0].bit_length())
    if shape not in experts.measured:
        if tokens.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return ""
        calls = {way: partial(run, way) for way in ways}
        fitting = {way: call for way, call in calls.items() if _fits(call)}
        times = {way: milliseconds(call) for way, call in fitting.items()}
        experts.measured[shape] = min(times, key=times.__getitem__) if times else ""
    way: str = experts.measured[shape]
    return way


def _fits(call: Callable[[], object]) -> bool:
    """Make a call, which may compile; False where there is less memory than it takes."""
    try:
        call()
    except torch.OutOfMemoryError:
        return False
    return True


def milliseconds_on_gpu(call: Callable[[], object], calls: int = 10) -> float:
    """The time of one of so many calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls
