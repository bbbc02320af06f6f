"""Executed (token, expert) pairs on a GPU, in Triton; nothing waits for the GPU, so CUDA graphs can hold it.

Three steps. ``_list_tokens`` turns the mask into a list of tokens for each expert and chunk of ``CHUNK`` tokens.
``_up`` gathers the rows of one list, multiplies by the expert's weights with float32 sums, and writes what the
activation gives to ``hidden``, ``(N, E * s)``. The down projection has two ways, chosen by ``SCATTER_FROM``:

- *scatter*: ``_down`` multiplies the executed rows only, and adds to the output in float32 with atomics;
- *dense*: ``hidden`` starts as zeros, and one cuBLAS product does the rest.

Why two. On an H100 a pair costs ``4 d`` bytes of atomics whatever its ``s``, at some 2.5 TB/s. With d=768, h=3,072,
16k tokens, E=128 (s=24) and 20% executed that is 1.3 GB or 0.5 ms, when all of the dense down projection takes 0.12 ms
on tensor cores. Atomics win from about s=90 on at 20% executed and s=40 at 10%; in float32, where the product is
some ten times slower, far earlier. Keeping the sum of a block of tokens in registers instead makes each product as
large as the dense one: at random masks, 16 tokens (the fewest a product takes) use 97% of the experts between them.
``_up`` reads ``2 d`` bytes a pair, 0.65 GB there, from the L2 cache at some 5.5 TB/s.

All this is estimated, with the rates above and 650 TFLOP/s assumed, not measured. It puts the layer at 20% executed
near the dense FFN's own 0.25 to 0.3 ms for E=128, and near half of it for E=24: narrow experts are bound by memory.
``tests/benchmarks/triton_on_gpu.py`` measures both ways on the GPU at hand.

Work space, in bytes: ``2 N E`` of lists (N rounded up to ``CHUNK``), ``N E s`` elements of ``hidden`` (what the dense
FFN holds too), and by *scatter* ``4 N d`` for the sums.
"""

from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.execution._eligibility import obstacle, run_type
from d2dmoe_pl.moe.experts.experts import Experts

try:
    # the package, not this file; its name is taken below by the function that `plugins` looks for
    from triton import cdiv, jit, knobs, next_power_of_2
    from triton import language as tl
except ImportError as error:
    raise ConfigError("backend='triton': the package triton is not installed; it comes with torch for CUDA") from error

CHUNK = 512
"""Tokens of one list: at 20% executed it fills one block of 128 rows to four fifths."""

SCATTER_FROM = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
"""The supported types of tokens and weights, and the smallest ``s`` for which the down projection goes by scatter."""

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))  # TRITON_INTERPRET=1 when this file was imported


@jit
def _multiply(x, w, total):
    """``total + x @ w``, without TF32."""
    if INTERPRETED:  # Triton 3.9's interpreter multiplies the bit patterns of bfloat16
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, total, input_precision="ieee")


@jit
def _activate(x, KIND: tl.constexpr):  # noqa: N803
    """The functions of ``moe/experts/activation_kinds.py``, on float32; NaN stays NaN."""
    if KIND == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(KIND == "tanh")
        y = 2 * tl.sigmoid(2 * x) - 1
    return y


@jit
def _list_tokens(mask, rows, counts, num_tokens, num_experts, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):  # noqa: N803
    """``rows (chunks, E, CHUNK)``: from the left, the chosen tokens' places in the chunk; ``counts (chunks, E)``."""
    chunk = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    place = tl.arange(0, CHUNK)
    token = chunk * CHUNK + place
    inside = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    chosen = tl.load(mask + token[:, None] * num_experts + expert[None, :], mask=inside, other=0).to(tl.int32)
    slot = tl.cumsum(chosen, axis=0) - 1  # (CHUNK, BLOCK_E)
    lists = rows + (chunk * num_experts + expert[None, :]) * CHUNK
    tl.store(lists + slot, tl.broadcast_to(place[:, None], (CHUNK, BLOCK_E)).to(tl.int16), mask=chosen != 0)
    tl.store(counts + chunk * num_experts + expert, tl.sum(chosen, axis=0), mask=expert < num_experts)


@jit
def _up(
    tokens, rows, counts, up_weight, up_bias, gate_weight, gate_bias, hidden, num_experts,
    D: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr, CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One expert, one chunk, ``BLOCK_N`` of its neurons; ``BLOCK_M`` rows at a time."""
    S_BLOCKS: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N  # noqa: N806
    expert = tl.program_id(0) // S_BLOCKS
    chunk = tl.program_id(1).to(tl.int64)
    place = chunk * num_experts + expert
    count = tl.load(counts + place)
    neuron = tl.program_id(0) % S_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    weight_row = (expert.to(tl.int64) * S + neuron) * D
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        token = chunk * CHUNK + tl.load(rows + place * CHUNK + slot, mask=slot < count, other=0)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            in_d = k + column < D
            x = tl.load(tokens + token[:, None] * D + (k + column)[None, :], (slot < count)[:, None] & in_d, 0.0)
            w_mask = in_d[:, None] & (neuron < S)[None, :]
            w = tl.load(up_weight + weight_row[None, :] + (k + column)[:, None], w_mask, 0.0)
            up = _multiply(x, w, up)
            if gate_weight is not None:
                w = tl.load(gate_weight + weight_row[None, :] + (k + column)[:, None], w_mask, 0.0)
                gate = _multiply(x, w, gate)
        if up_bias is not None:
            up += tl.load(up_bias + expert * S + neuron, neuron < S, 0.0).to(tl.float32)[None, :]
        if gate_weight is not None:
            if gate_bias is not None:
                gate += tl.load(gate_bias + expert * S + neuron, neuron < S, 0.0).to(tl.float32)[None, :]
            value = _activate(gate, ACTIVATION) * up
        else:
            value = _activate(up, ACTIVATION)
        to = hidden + token[:, None] * (num_experts * S) + (expert * S + neuron)[None, :]
        tl.store(to, value.to(hidden.dtype.element_ty), mask=(slot < count)[:, None] & (neuron < S)[None, :])


@jit
def _down(
    hidden, rows, counts, down_weight, sums, num_experts,
    D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One expert, one chunk, ``BLOCK_N`` columns of the output, added to ``sums``."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N  # noqa: N806
    expert = tl.program_id(0) // D_BLOCKS
    chunk = tl.program_id(1).to(tl.int64)
    place = chunk * num_experts + expert
    count = tl.load(counts + place)
    column = tl.program_id(0) % D_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron = tl.arange(0, BLOCK_K)
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        token = chunk * CHUNK + tl.load(rows + place * CHUNK + slot, mask=slot < count, other=0)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, S, BLOCK_K):
            in_s = k + neuron < S
            h_at = token[:, None] * (num_experts * S) + (expert * S + k + neuron)[None, :]
            h = tl.load(hidden + h_at, (slot < count)[:, None] & in_s[None, :], 0.0)
            w_at = (expert.to(tl.int64) * S + k + neuron)[:, None] * D + column[None, :]
            w = tl.load(down_weight + w_at, in_s[:, None] & (column < D)[None, :], 0.0)
            product = _multiply(h, w, product)
        to = sums + token[:, None] * D + column[None, :]
        tl.atomic_add(to, product, mask=(slot < count)[:, None] & (column < D)[None, :], sem="relaxed")


def _block(size: int, largest: int) -> int:
    """A power of two for ``size``, at least the 16 that ``tl.dot`` takes."""
    return min(max(next_power_of_2(size), 16), largest)


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
) -> Tensor:
    """The operator under :func:`triton`; all tensors of one type, shapes as in ``Experts``."""
    num_tokens, d_model = tokens.shape
    num_experts, expert_dim, d_out = down_weight.shape
    if num_tokens == 0:
        return tokens.new_empty(0, d_out)
    tokens, mask = tokens.contiguous(), mask.contiguous().view(torch.uint8)
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    by_scatter = expert_dim >= SCATTER_FROM[tokens.dtype]
    is_float = tokens.dtype == torch.float32  # multiplied on plain cores, in smaller blocks
    products = 1 if gate_weight is None else 2
    num_chunks = cdiv(num_tokens, CHUNK)
    rows = tokens.new_empty((num_chunks, num_experts, CHUNK), dtype=torch.int16)
    counts = tokens.new_empty((num_chunks, num_experts), dtype=torch.int32)
    new_hidden = tokens.new_empty if by_scatter else tokens.new_zeros
    hidden = new_hidden((num_tokens, num_experts * expert_dim))
    # three stages of these blocks take at most 96 KB of shared memory, which cards from 2020 on have
    block_m = _block(num_tokens, 64 if is_float else 128)
    block_s = _block(expert_dim, 64 if is_float or products == 2 else 128)
    block_d = _block(d_out, 64 if is_float else 128)
    with torch.cuda.device_of(tokens):
        _list_tokens[num_chunks, cdiv(num_experts, 16)](mask, rows, counts, num_tokens, num_experts, CHUNK, BLOCK_E=16)
        _up[num_experts * cdiv(expert_dim, block_s), num_chunks](
            tokens, rows, counts, up_weight, up_bias, gate_weight, gate_bias, hidden, num_experts,
            d_model, expert_dim, activation, CHUNK,
            BLOCK_M=block_m, BLOCK_N=block_s, BLOCK_K=_block(d_model, 32 if is_float else 64),
            num_warps=8 if block_s * products > 64 else 4, num_stages=3,
        )  # fmt: skip
        if not by_scatter:
            dense = down_weight.flatten(0, 1)  # (E * s, d_out)
            return hidden @ dense if down_bias is None else torch.addmm(down_bias, hidden, dense)
        sums = tokens.new_zeros((num_tokens, d_out), dtype=torch.float32)
        if down_bias is not None:
            sums += down_bias
        _down[num_experts * cdiv(d_out, block_d), num_chunks](
            hidden, rows, counts, down_weight, sums, num_experts,
            d_out, expert_dim, CHUNK,
            BLOCK_M=block_m, BLOCK_N=block_d, BLOCK_K=_block(expert_dim, 32 if is_float else 64),
            num_warps=8 if block_d > 64 else 4, num_stages=3,
        )  # fmt: skip
    return sums.to(tokens.dtype)


@moe_triton.register_fake
def _(tokens: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    down_weight = rest[4]
    return tokens.new_empty(tokens.shape[0], down_weight.shape[2])


def triton(experts: Experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; for inference on a CUDA device, or on any under ``TRITON_INTERPRET=1``.

    Under autocast tokens and weights are cast to its type, as the dense layer's would be.

    Raises:
        ConfigError: If gradients or an active dropout would be needed, or the device, type or activation is not one
            that the kernel has.
    """
    why_not = obstacle(experts, tokens, list(SCATTER_FROM))
    if tokens.device.type != "cuda" and not INTERPRETED.value:
        why_not = f"needs tokens on a CUDA device, they are on {tokens.device}"
    check(why_not is None, f"backend='triton': {why_not}")
    dtype = run_type(experts, tokens)
    cast = (None if tensor is None else tensor.to(dtype) for tensor in experts.weights_in(dtype))
    return moe_triton(tokens.to(dtype), mask, *cast, experts.activation_kind)


BACKEND = triton
