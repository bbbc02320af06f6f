"""Executed (token, expert) pairs on a GPU, in Triton and cuBLAS; nothing waits for the GPU, so CUDA graphs can hold it.

Either product can go by lists or be dense, which makes four ways (``WAYS``):

- *listed up*: ``list_tokens`` turns the mask into a list of tokens for each expert and chunk of ``CHUNK`` tokens;
  ``up_listed`` gathers the rows of one list, multiplies by the expert's weights with float32 sums, and writes what the
  activation gives to ``hidden``, ``(N, E * s)``;
- *dense up*: one cuBLAS product (two if gated), and ``activate_all`` in its place, which writes zeros off the mask;
- *listed down*: ``down_listed`` multiplies the rows of each list, and keeps what each pair gives in ``pairs``, in the
  tokens' type; ``sum_pairs`` adds up those of each token, in float32 and in a fixed order, so that nothing is random;
- *dense down*: ``hidden`` has zeros where nothing ran, and one cuBLAS product does the rest.

Work space, in bytes: ``2 N E`` of lists (N rounded up to ``CHUNK``), ``N E s`` elements of ``hidden`` (what the dense
FFN holds too), and *listed down* ``2 N E`` of places and ``PAIRS_SPACE`` of pairs, or ``CHUNK E d`` elements if that is
more: so many chunks at a time that all pairs would fit in it.
"""

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

PAIRS_SPACE = 256 * 2**20
"""Bytes that all pairs of the chunks that are multiplied at a time may take: some of them stay in the L2 cache."""

FEW_TOKENS = 16
"""Up to here reading weights is all that counts."""

WAYS = {"listed": (True, True), "listed_up": (True, False), "listed_down": (False, True), "dense": (False, False)}
"""By name, whether the first product goes by lists, and whether the second does."""


def _block(size: int, largest: int) -> int:
    """A power of two for ``size``, at least the 16 that ``tl.dot`` takes."""
    return min(max(next_power_of_2(size), 16), largest)


def way_by_rule(num_tokens: int, expert_dim: int, dtype: torch.dtype) -> str:
    """The way to take where none can be measured, as while a CUDA graph is captured."""
    return "listed" if num_tokens <= FEW_TOKENS or dtype == torch.float32 or expert_dim >= 64 else "listed_up"


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
) -> Tensor:
    """The operator under :func:`triton`; all tensors of one type, shapes as in ``Experts``; ``way`` "" goes by rule."""
    num_tokens, d_model = tokens.shape
    num_experts, expert_dim, d_out = down_weight.shape
    if num_tokens == 0:
        return tokens.new_empty(0, d_out)
    tokens, mask = tokens.contiguous(), mask.contiguous().view(torch.uint8)
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    by_lists_up, by_lists_down = WAYS[way or way_by_rule(num_tokens, expert_dim, tokens.dtype)]
    is_float = tokens.dtype == torch.float32  # multiplied on plain cores, in smaller blocks
    is_few = num_tokens <= FEW_TOKENS
    products = 1 if gate_weight is None else 2
    chunk = _block(num_tokens, CHUNK)
    num_chunks = cdiv(num_tokens, chunk)
    block_m = _block(num_tokens, 64 if is_float else 128)
    with torch.cuda.device_of(tokens):
        if by_lists_up or by_lists_down:
            rows = tokens.new_empty((num_chunks, num_experts, chunk), dtype=torch.int16)
            slots = tokens.new_empty((num_tokens, num_experts), dtype=torch.int16) if by_lists_down else None
            counts = tokens.new_empty((num_chunks, num_experts), dtype=torch.int32)
            list_tokens[num_chunks, cdiv(num_experts, 4)](
                mask, rows, slots, counts, num_tokens, num_experts, chunk, BLOCK_E=4
            )
        if by_lists_up:
            new_hidden = tokens.new_empty if by_lists_down else tokens.new_zeros
            hidden = new_hidden((num_tokens, num_experts * expert_dim))
            widest = 64 if is_float or (products == 2 and not _has_much_shared_memory(tokens)) else 128
            block_s = _block(expert_dim, 32 if is_few else widest)
            up_listed[num_experts * cdiv(expert_dim, block_s), num_chunks](
                tokens, rows, counts, up_weight, up_bias, gate_weight, gate_bias, hidden, num_experts,
                d_model, expert_dim, activation, chunk,
                BLOCK_M=block_m, BLOCK_N=block_s, BLOCK_K=_block(d_model, 32 if is_float else 64),
                num_warps=4 if is_few or (block_s == 128) == (products == 1) else 8, num_stages=5 if is_few else 3,
            )  # fmt: skip
        else:
            hidden = _all_neurons(tokens, up_weight, up_bias)
            gate = None if gate_weight is None else _all_neurons(tokens, gate_weight, gate_bias)
            width, block = hidden.shape[1], _block(hidden.shape[1], 1024)
            activate_all[num_tokens, cdiv(width, block)](
                hidden, gate, None if by_lists_down else mask, num_experts, expert_dim, width, activation, block
            )
        if not by_lists_down:
            dense = down_weight.flatten(0, 1)  # (E * s, d_out)
            return hidden @ dense if down_bias is None else torch.addmm(down_bias, hidden, dense)
        output = tokens.new_empty((num_tokens, d_out))
        at_a_time = max(1, PAIRS_SPACE // (chunk * num_experts * d_out * tokens.element_size()))  # chunks
        pairs = tokens.new_empty((min(at_a_time, num_chunks), num_experts, chunk, d_out))
        block_d = _block(d_out, 64 if is_float else 128)
        for first in range(0, num_chunks, at_a_time):
            chunks = min(at_a_time, num_chunks - first)
            down_listed[num_experts * cdiv(d_out, block_d), chunks](
                hidden, rows, counts, down_weight, pairs, first, num_experts,
                d_out, expert_dim, chunk,
                BLOCK_M=block_m, BLOCK_N=block_d, BLOCK_K=_block(expert_dim, 32 if is_float else 64),
                num_warps=8 if block_d > 64 else 4, num_stages=3,
            )  # fmt: skip
            sum_pairs[min(chunks * chunk, num_tokens - first * chunk), cdiv(d_out, 1024)](
                pairs, mask, slots, down_bias, output, first * chunk, num_experts,
                d_out, chunk, BLOCK_D=_block(d_out, 1024),
            )  # fmt: skip
    return output


def _has_much_shared_memory(tokens: Tensor) -> bool:
    """Whether three stages of 128 tokens and twice 128 neurons fit; all cards from 2020 on have the 96 KB of others."""
    if tokens.device.type != "cuda":
        return False
    properties = driver.active.utils.get_device_properties(tokens.device.index)
    return bool(properties["max_shared_mem"] >= 160 * 1024)


def _all_neurons(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(N, E * s)``, before the activation."""
    weight = weight.flatten(0, 1).t()  # (d, E * s)
    return tokens @ weight if bias is None else torch.addmm(bias.flatten(), tokens, weight)


@moe_triton.register_fake
def _(tokens: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    down_weight = rest[4]
    return tokens.new_empty(tokens.shape[0], down_weight.shape[2])


def triton(experts: Experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; for inference on a CUDA device, or on any under ``TRITON_INTERPRET=1``.

    Of the four ways the fastest is taken, by a measurement on first use; see :func:`fastest`. Under autocast tokens
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
    run = partial(moe_triton, tokens.to(dtype), mask, *cast, experts.activation_kind)
    way = "" if INTERPRETED.value else fastest(WAYS, run, experts, tokens, milliseconds_on_gpu)
    return run(way)


BACKEND = triton
