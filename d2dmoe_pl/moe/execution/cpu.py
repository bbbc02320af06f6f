"""Executed (token, expert) pairs on the CPU, in C++ (``csrc``), compiled on first use.

Tokens are bucketed by expert, block by block. For each expert, the rows of its tokens are multiplied, and the second
product is added to the rows of the output, so that no output of a pair is ever stored. In bf16 and int8 the activations
of a block's experts are all computed before that, and outputs added to a few columns at a time, so that these lie in
the cache; by AMX where there is any.

In fp32 the weights are read as they are. In bf16 the first products are ATen's ``brgemm`` on weights packed for it, a
copy that costs as much memory again as the experts' weights; it is made in the first call, and again after the weights
were written to. Writes through ``.data`` or by ``torch.distributed`` go unnoticed, as autograd would not notice them
either; what optimizers write is noticed, whatever they write it by. Without ``brgemm``
for bf16, that copy is in fp32, and so are the products.

Where that is faster, as for many chosen experts or small ones, all are computed at once by dense products, 1,024
tokens at a time, and what the mask leaves out is set to zero. With weights in int8 that is in int8 too, by another copy
of the weights, whose outputs have one scale a column for all experts, and a token's activations are rounded together.
"""

import functools
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.execution._cpp_build import CompileError, compiled_extension, load_extension
from d2dmoe_pl.moe.execution._eligibility import obstacle, run_type
from d2dmoe_pl.moe.experts.experts import Experts, to_pack

TYPES = (torch.float32, torch.bfloat16)
NAME = "d2dmoe_pl_moe_cpu"
SOURCE = Path(__file__).parent / "csrc" / "moe_cpu.cpp"


@functools.cache
def operators_version() -> str:
    """Changes with the operators' sources."""
    files = sorted(file for file in SOURCE.parent.iterdir() if file.is_file())
    return hashlib.sha256("\0".join(file.read_text() for file in files).encode()).hexdigest()[:16]


@torch.compiler.assume_constant_result
def compile_failure() -> str | None:
    """Load the operators of ``csrc``, once a process; the compiler's message if that fails."""
    return _load()


def operators_library() -> Path:
    """The compiled operators, which are compiled if need be.

    Raises:
        CompileError: If there is no compiler, it fails, or no folder can be written.
    """
    return compiled_extension(NAME, SOURCE)


def take_operators(library: Path) -> None:
    """Have this process run the operators in ``library``, compiled from the same sources, unless it has some already.

    Raises:
        OSError: If it cannot be loaded here.
    """
    if not _has_operators():
        torch.ops.load_library(str(library))
        _load.cache_clear()


def _has_operators() -> bool:
    return hasattr(torch.ops.d2dmoe_pl, "moe_layer_cpu")


@functools.cache
def _load() -> str | None:
    try:
        if not _has_operators():
            load_extension(NAME, SOURCE)
        torch.ops.d2dmoe_pl.moe_layer_cpu  # noqa: B018 (whether it is there)
    except (CompileError, AttributeError) as error:
        return str(error)
    register_optimizer_step_post_hook(_count_changes)

    def shape(tokens: Tensor, *arguments: Any) -> Tensor:
        weights = next(each for each in reversed(arguments) if isinstance(each, list | tuple) and len(each) > 4)
        return tokens.new_empty(*tokens.shape[:-1], weights[4].shape[2])

    def shape_of_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    def shape_of_attention(query: Tensor, *_: Any) -> Tensor:
        batch, heads, length, width = query.shape
        return query.new_empty(batch, length, heads, width).transpose(1, 2)

    def shape_of_self_attention(x: Tensor, weights: list[Tensor], *arguments: Any) -> Tensor:
        batch, length, _ = x.shape
        heads = next(each for each in arguments if not isinstance(each, list | tuple))
        width = sum(weight.shape[0] for weight in weights) // 3 // heads
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    def shape_of_linears(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))

    shapes: dict[str, Callable[..., Any]] = {
        "moe_cpu": shape,
        "moe_layer_cpu": shape,
        "int8_linear_cpu": shape_of_linear,
        "int8_linears_cpu": shape_of_linears,
        "attention_cpu": shape_of_attention,
        "int8_self_attention_cpu": shape_of_self_attention,
    }
    for name, function in shapes.items():
        torch.library.register_fake(f"d2dmoe_pl::{name}", partial(_on_one_device, function), allow_override=True)
    return None


def _on_one_device(shape: Callable[..., Any], first: Tensor, *arguments: Any) -> Any:
    """What ``shape`` gives, unless one tensor among others is without memory: torch then asks for the shape alone."""
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor) and tensor.device != first.device:
            raise ValueError(f"weights are on {tensor.device}: must be on {first.device}, where the tokens are")
    return shape(first, *arguments)


def _count_changes(optimizer: Optimizer, *_: Any) -> None:
    """Let packed copies see a step that torch does not count as a change, as it does not those of fused optimizers."""
    changed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.autograd.graph.increment_version([parameter for parameter in changed if not parameter.is_inference()])


def cpu(
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; for inference.

    Raises:
        ConfigError: If gradients or an active dropout would be needed, the device, type or activation is not one that
            the kernel has, or it cannot be compiled.
    """
    why_not = obstacle(experts, tokens, TYPES) if tokens.device.type == "cpu" else f"tokens are on {tokens.device}"
    if why_not is None and (failure := compile_failure()) is not None:
        why_not = f"the compiler says: {failure}"
    if why_not is not None:
        raise ConfigError(f"backend='cpu': {why_not}")
    weights, tokens = to_pack(experts, experts.weights), tokens.to(run_type(experts, tokens))
    kind = experts.activation_kind
    return torch.ops.d2dmoe_pl.moe_cpu.default(tokens, mask, weights, kind, cutoff, gate_cutoff)


BACKEND = cpu
