"""The kernel for the call at hand: a compiled one for inference where there is one, ``reference`` for training."""

import functools
import warnings

import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.execution import cpu as on_cpu
from d2dmoe_pl.moe.execution._backend import BACKENDS, Backend
from d2dmoe_pl.moe.execution._eligibility import has_active_dropout, is_traced, needs_gradients, obstacle
from d2dmoe_pl.moe.execution.grouped import grouped
from d2dmoe_pl.moe.execution.reference import reference
from d2dmoe_pl.moe.experts.experts import Experts

_CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def auto(
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; differentiable."""
    return choose(experts, tokens)(experts, tokens, mask, cutoff, gate_cutoff)


def choose(experts: Experts, tokens: Tensor) -> Backend:
    """The kernel for these tokens.

    With gradients, which have to pass through every expert that runs, computing all and masking is about as fast as
    anything in PyTorch. Without, computing executed pairs only is faster, and compiled kernels are far faster still.
    """
    device = tokens.device.type
    if is_traced():
        warn_once(
            "backend='auto': traced or exported to ONNX, every expert is computed and masked, which saves no time"
        )
        return reference
    if needs_gradients((tokens, *experts.weights)) or has_active_dropout(experts) or device not in ("cpu", "cuda"):
        return reference
    if device == "cuda":
        if obstacle(experts, tokens, _CUDA_TYPES):
            return grouped
        if _has_triton():
            return _on_triton
        warn_once("backend='auto': Triton is not installed, and experts run by 'grouped', one after the other")
        return grouped
    if obstacle(experts, tokens, on_cpu.TYPES):
        return grouped
    failure = on_cpu.compile_failure()
    if failure is None:
        return on_cpu.cpu
    warn_once(
        "backend='auto': the CPU kernel cannot be compiled here, and experts run by 'grouped', which takes about "
        f"three times as long; the compiler says: {failure}"
    )
    return grouped


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    """Of all that may be constant while a graph is made, a truth can be asked; a function cannot."""
    return _can_import_triton()


@functools.cache
def _can_import_triton() -> bool:
    """Whether there is the backend for GPUs, looked for once a process."""
    try:
        BACKENDS.find("triton", "backend")
    except ConfigError:
        return False
    return True


def _on_triton(
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    from d2dmoe_pl.moe.execution.triton import triton  # noqa: PLC0415 (cannot be imported without Triton)

    return triton(experts, tokens, mask, cutoff, gate_cutoff)


@torch.compiler.assume_constant_result
def warn_once(message: str) -> None:
    """Warn, once a process."""
    _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


BACKEND = auto
