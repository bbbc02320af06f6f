"""The kernel for the call at hand: a compiled one for inference where there is one, ``reference`` for training."""

import functools
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.execution import cpu as on_cpu
from d2dmoe_pl.moe.execution._backend import BACKENDS, Backend
from d2dmoe_pl.moe.execution._eligibility import has_active_dropout, needs_gradients, obstacle
from d2dmoe_pl.moe.execution.grouped import grouped
from d2dmoe_pl.moe.execution.reference import reference
from d2dmoe_pl.moe.experts.experts import Experts

_CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def auto(experts: Experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; differentiable."""
    backend = choose(experts, tokens)
    if tokens.device.type == "cuda" and backend is not reference and _can_measure():
        backend = fastest([backend, reference], experts, tokens, mask, _milliseconds_on_gpu)
    return backend(experts, tokens, mask)


def fastest(
    backends: Sequence[Backend],
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    milliseconds: Callable[[Callable[[], object]], float],
) -> Backend:
    """The fastest of ``backends`` for so many tokens, by a measurement on first use.

    It is kept with the experts, for each type and power of two of tokens, until ``set_tau_`` or ``set_backend_``: how
    much there is to save depends on how many experts run.

    Args:
        backends: To choose from.
        experts: To run.
        tokens: ``(N, d_model)``.
        mask: ``(N, E)``.
        milliseconds: Times a call, which has been made once before.
    """
    shape = (tokens.dtype, tokens.device, tokens.shape[0].bit_length())
    if shape not in experts.measured:
        calls = [partial(backend, experts, tokens, mask) for backend in backends]
        for call in calls:
            call()  # the first may compile
        times = [milliseconds(call) for call in calls]
        experts.measured[shape] = backends[times.index(min(times))]
    return experts.measured[shape]


def _can_measure() -> bool:
    """Whether a call may be timed: neither traced nor captured in a CUDA graph."""
    return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def _milliseconds_on_gpu(call: Callable[[], object], calls: int = 10) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def choose(experts: Experts, tokens: Tensor) -> Backend:
    """The kernel for these tokens.

    With gradients, which have to pass through every expert that runs, computing all and masking is about as fast as
    anything in PyTorch. Without, computing executed pairs only is faster, and compiled kernels are far faster still.
    """
    device = tokens.device.type
    if torch.onnx.is_in_onnx_export():
        _warn_once("backend='auto': exported to ONNX, every expert is computed and masked, which saves no time there")
        return reference
    if needs_gradients(experts, tokens) or has_active_dropout(experts) or device not in ("cpu", "cuda"):
        return reference
    if device == "cuda":
        if obstacle(experts, tokens, _CUDA_TYPES):
            return grouped
        triton = _triton()
        if triton is None:
            _warn_once("backend='auto': Triton is not installed, and experts run by 'grouped', one after the other")
        return triton or grouped
    if obstacle(experts, tokens, on_cpu.TYPES):
        return grouped
    failure = on_cpu.compile_failure()
    if failure is None:
        return on_cpu.cpu
    _warn_once(
        "backend='auto': the CPU kernel cannot be compiled here, and experts run by 'grouped', which takes about "
        f"three times as long; the compiler says: {failure}"
    )
    return grouped


@torch.compiler.assume_constant_result
def _triton() -> Backend | None:
    return _find_triton()


@functools.cache
def _find_triton() -> Backend | None:
    """The backend for GPUs, looked for once a process, where there is a GPU; None without Triton."""
    try:
        return BACKENDS.find("triton", "backend") if torch.cuda.is_available() else None
    except ConfigError:
        return None


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


BACKEND = auto
