"""Executed (token, expert) pairs on a GPU, in Triton and cuBLAS; nothing waits for the GPU, so CUDA graphs can hold it.

``list_tokens`` turns the mask into a list of tokens for each expert and chunk of ``CHUNK`` tokens. There are three
ways (``WAYS``), the fastest of which depends on how many experts run, and how wide they are:

- ``listed``: for each list, rows of tokens are gathered, multiplied by the expert's weights with float32 sums, and what
  each pair gives is kept in ``pairs``, in the tokens' type: in one kernel, ``both_listed``, or in two for few tokens or
  wide experts. ``sum_pairs`` adds up those of each token, in float32 and in a fixed order, so that nothing is random;
- ``listed_up``: ``up_listed`` writes activations into zeros, ``(N, E * s)``, and one cuBLAS product does the rest;
- ``dense``: two cuBLAS products (three if gated), and ``activate_all`` between them, which writes zeros off the mask.

Work space, in bytes: ``4 N E`` of lists and places (N rounded up to ``CHUNK``); activations, ``N E s`` elements, what
the dense FFN holds too, but where ``both_listed`` keeps them; and of ``listed``, ``PAIRS_SPACE``, or ``CHUNK E d``
elements if that is more: so many chunks at a time that all pairs would fit in it.
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.execution._eligibility import obstacle, run_type
from d2dmoe_pl.moe.execution._measured_choice import fastest, milliseconds_on_gpu
from d2dmoe_pl.moe.experts.experts import Experts

try:
    # the package, not this file; its name is taken below by the function that `plugins` looks for
    from triton import cdiv, next_power_of_2
    from triton.runtime import driver

    from d2dmoe_pl.moe.execution._triton_kernels import (
        INTERPRETED,
        activate_all,
        both_listed,
        down_listed,
        list_tokens,
        sum_pairs,
        up_listed,
    )
except ImportError as error:
    raise ConfigError("backend='triton': the package triton is not installed; it comes with torch for CUDA") from error

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of tokens and weights."""

CHUNK = 512
"""Tokens of one list: at 20% executed it fills one block of 128 rows to four fifths."""

PAIRS_SPACE = 512 * 2**20
"""Bytes that all pairs of the chunks that are multiplied at a time may take."""

FEW_TOKENS = 16
"""Up to here reading weights is all that counts."""

FEW_FOR_LISTS = 256
"""Up to here, in half precision, lists of tokens cost more than they save: measured at 128 tokens, 768 x 3,072."""

LARGEST_BLOCKS = 200 * 1024
"""Bytes of shared memory that four stages of 128 tokens and twice 128 neurons may take, which an H100 has."""

WAYS = ("listed", "listed_up", "dense")


def _block(size: int, largest: int) -> int:
    """A power of two for ``size``, at least the 16 that ``tl.dot`` takes."""
    return min(max(next_power_of_2(size), 16), largest)


def way_by_rule(num_tokens: int, expert_dim: int, dtype: torch.dtype) -> str:
    """The way to take where none can be measured, as in a compiled model or while a CUDA graph is captured."""
    if num_tokens <= FEW_TOKENS or dtype == torch.float32:
        return "listed"
    if num_tokens <= FEW_FOR_LISTS:
        return "dense"
    return "listed" if expert_dim >= 96 else "listed_up"


@torch.library.custom_op("d2dmoe_pl::moe_triton", mutates_args=())
def moe_triton(
    tokens: Tensor,
    mask: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    way: str,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """The operator under :func:`triton`; all tensors of one type, shapes as in ``Experts``; ``way`` "" goes by rule."""
    num_tokens = tokens.shape[0]
    num_experts, expert_dim, d_out = down_weight.shape
    if num_tokens == 0:
        return tokens.new_empty(0, d_out)
    tokens, mask = tokens.contiguous(), mask.contiguous().view(torch.uint8)
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    way = way or way_by_rule(num_tokens, expert_dim, tokens.dtype)
    weights, cutoffs = (up_weight, up_bias, gate_weight, gate_bias), (cutoff, gate_cutoff)
    with torch.cuda.device_of(tokens):
        if way == "listed":
            return _listed(tokens, mask, weights, down_weight, down_bias, activation, cutoffs)
        if way == "listed_up":
            hidden = tokens.new_zeros((num_tokens, num_experts * expert_dim))
            _up_listed(tokens, _lists(mask, None), weights, hidden, activation, cutoffs)
        else:
            hidden = _all_neurons(tokens, up_weight, up_bias)
            gate = None if gate_weight is None else _all_neurons(tokens, gate_weight, gate_bias)
            width, block = hidden.shape[1], _block(hidden.shape[1], 1024)
            grid = (num_tokens, cdiv(width, block))
            activate_all[grid](hidden, gate, mask, *cutoffs, num_experts, expert_dim, width, activation, block)
    dense = down_weight.flatten(0, 1)  # (E * s, d_out)
    return hidden @ dense if down_bias is None else torch.addmm(down_bias, hidden, dense)


def _lists(mask: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``list_tokens`` makes of a mask: the lists, ``(chunks, E, tokens of a chunk)``, and their lengths."""
    num_tokens, num_experts = mask.shape
    chunk = _block(num_tokens, CHUNK)
    num_chunks = cdiv(num_tokens, chunk)
    rows = mask.new_empty((num_chunks, num_experts, chunk), dtype=torch.int16)
    counts = mask.new_empty((num_chunks, num_experts), dtype=torch.int32)
    grid = (num_chunks, cdiv(num_experts, 4))
    list_tokens[grid](mask, rows, slots, counts, num_tokens, num_experts, chunk, BLOCK_E=4)
    return rows, counts


def _up_listed(
    tokens: Tensor,
    lists: tuple[Tensor, Tensor],
    weights: Sequence[Tensor | None],
    hidden: Tensor,
    activation: str,
    cutoffs: tuple[Tensor | None, Tensor | None],
) -> None:
    (num_tokens, d_model), (rows, counts), up_weight = tokens.shape, lists, weights[0]
    assert up_weight is not None
    num_experts, expert_dim = up_weight.shape[:2]
    is_float, is_gated, is_few = tokens.dtype == torch.float32, weights[2] is not None, num_tokens <= FEW_TOKENS
    widest = 32 if is_few else 64 if is_float or (is_gated and not _has_much_shared_memory(tokens)) else 128
    block_s = _block(expert_dim, widest)
    up_listed[num_experts * cdiv(expert_dim, block_s), len(rows)](
        tokens, rows, counts, *weights, *cutoffs, hidden, num_experts, d_model, expert_dim, activation, rows.shape[2],
        BLOCK_M=_block(num_tokens, 64 if is_float else 128),
        BLOCK_N=block_s,
        BLOCK_K=_block(d_model, 32 if is_float else 64),
        num_warps=4 if is_few or (block_s == 128) != is_gated else 8,
        num_stages=5 if is_few else 3,
    )  # fmt: skip


def _listed(
    tokens: Tensor,
    mask: Tensor,
    weights: Sequence[Tensor | None],
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    cutoffs: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    num_tokens, d_model = tokens.shape
    num_experts, expert_dim, d_out = down_weight.shape
    is_float = tokens.dtype == torch.float32  # multiplied on plain cores, in smaller blocks
    slots = mask.new_empty((num_tokens, num_experts), dtype=torch.int16)
    rows, counts = _lists(mask, slots)
    num_chunks, _, chunk = rows.shape
    block_m = _block(num_tokens, 32 if is_float else 128)
    is_one_kernel = num_tokens > FEW_TOKENS and expert_dim <= 128 and _has_much_shared_memory(tokens)
    hidden = None if is_one_kernel else tokens.new_empty((num_tokens, num_experts * expert_dim))
    if hidden is not None:
        _up_listed(tokens, (rows, counts), weights, hidden, activation, cutoffs)
    output = tokens.new_empty((num_tokens, d_out))
    at_a_time = max(1, PAIRS_SPACE // (chunk * num_experts * d_out * tokens.element_size()))  # chunks
    pairs = tokens.new_empty((min(at_a_time, num_chunks), num_experts, chunk, d_out))
    for first in range(0, num_chunks, at_a_time):
        chunks = min(at_a_time, num_chunks - first)
        if hidden is None:
            both_listed[num_experts, chunks](
                tokens, rows, counts, *weights, *cutoffs, down_weight, pairs, first, num_experts,
                d_model, expert_dim, d_out, activation, chunk,
                BLOCK_S=_block(expert_dim, 128), BLOCK_K=_block(d_model, 32 if is_float else 64),
                **_both_blocks(num_tokens, d_out, is_float, weights[2] is not None),
            )  # fmt: skip
        else:
            block_d = _block(d_out, 64 if is_float else 128)
            down_listed[num_experts * cdiv(d_out, block_d), chunks](
                hidden, rows, counts, down_weight, pairs, first, num_experts, d_out, expert_dim, chunk,
                BLOCK_M=block_m, BLOCK_N=block_d, BLOCK_K=_block(expert_dim, 32), num_warps=4, num_stages=3,
            )  # fmt: skip
        last = min((first + chunks) * chunk, num_tokens)
        blocks = _sum_blocks(num_tokens, num_experts, d_out)
        sum_pairs[last - first * chunk, cdiv(d_out, blocks["BLOCK_D"])](
            pairs, mask, slots, down_bias, output, first * chunk, num_experts, d_out, chunk, **blocks
        )
    return output


def _both_blocks(num_tokens: int, d_out: int, is_float: bool, is_gated: bool) -> dict[str, int]:
    """How ``both_listed`` is cut up: the best of eleven ways on an H200."""
    rows, columns, warps, stages = (32, 32, 4, 2) if is_float else (128, 64, 8, 4) if is_gated else (64, 64, 4, 4)
    return {
        "BLOCK_M": _block(num_tokens, rows),
        "BLOCK_N": _block(d_out, columns),
        "num_warps": warps,
        "num_stages": stages,
    }


def _sum_blocks(num_tokens: int, num_experts: int, d_out: int) -> dict[str, int]:
    """How ``sum_pairs`` is cut up: of few tokens by columns, so that many processors have something to do."""
    if num_tokens <= FEW_TOKENS:
        return {"BLOCK_E": _block(num_experts, 64), "BLOCK_D": 64, "num_warps": 4}
    return {"BLOCK_E": 1, "BLOCK_D": _block(d_out, 1024), "num_warps": 1}


def _has_much_shared_memory(tokens: Tensor) -> bool:
    """Whether it holds the largest blocks; those of the other kernels fit in the 96 KB that cards from 2020 on have."""
    return bool(INTERPRETED.value) or _shared_memory(tokens.device.index) >= LARGEST_BLOCKS


@functools.cache
def _shared_memory(device_index: int) -> int:
    """Bytes of it that a block may have; to ask takes a millisecond, of which a layer has fewer."""
    properties = driver.active.utils.get_device_properties(device_index)
    return int(properties["max_shared_mem"])


def _all_neurons(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(N, E * s)``, before the activation."""
    weight = weight.flatten(0, 1).t()  # (d, E * s)
    return tokens @ weight if bias is None else torch.addmm(bias.flatten(), tokens, weight)


@moe_triton.register_fake
def _(tokens: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    down_weight = rest[4]
    return tokens.new_empty(tokens.shape[0], down_weight.shape[2])


def triton(
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; for inference on a CUDA device, or on any under ``TRITON_INTERPRET=1``.

    Of the ways the fastest is taken, by a measurement on first use; see :func:`fastest`. Under autocast tokens
    and weights are cast to its type, as the dense layer's would be.

    Raises:
        ConfigError: If gradients or an active dropout would be needed, or the device, type or activation is not one
            that the kernel has.
    """
    why_not = obstacle(experts, tokens, TYPES)
    if tokens.device.type != "cuda" and not INTERPRETED.value:
        why_not = f"needs tokens on a CUDA device, they are on {tokens.device}"
    check(why_not is None, f"backend='triton': {why_not}")
    dtype = run_type(experts, tokens)
    cast = [None if tensor is None else tensor.to(dtype) for tensor in experts.weights_in(dtype)]
    operator = partial(moe_triton, tokens.to(dtype), mask, *cast, experts.activation_kind)

    def run(way: str) -> Tensor:
        return operator(way, cutoff, gate_cutoff)

    return run("" if INTERPRETED.value else fastest(WAYS, run, experts, tokens, milliseconds_on_gpu))


BACKEND = triton
