"""The kernels of :mod:`d2dmoe_pl.moe.execution.triton`; importing this needs the package triton."""

from triton import jit, knobs
from triton import language as tl

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
def _cut(x, cutoff):
    """0 for what is smaller than ``cutoff``, a pointer to a number or None; NaN stays NaN."""
    if cutoff is not None:
        x = tl.where(tl.abs(x) < tl.load(cutoff), 0.0, x)
    return x


@jit
def _activations(
    tokens, token, is_listed, up_weight, up_bias, gate_weight, gate_bias, cutoff, gate_cutoff, expert, neuron,
    D: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """What the activation gives for ``BLOCK_M`` gathered rows and ``BLOCK_N`` neurons of one expert, in float32."""
    column = tl.arange(0, BLOCK_K)
    weight_row = (expert.to(tl.int64) * S + neuron) * D
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        in_d = k + column < D
        x = tl.load(tokens + token[:, None] * D + (k + column)[None, :], is_listed[:, None] & in_d, 0.0)
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
        value = _cut(_activate(gate, ACTIVATION), gate_cutoff) * up
    else:
        value = _activate(up, ACTIVATION)
    return _cut(value, cutoff)


@jit
def list_tokens(
    mask, rows, slots, counts, num_tokens, num_experts, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``rows (chunks, E, CHUNK)``: from the left, the chosen tokens' places in the chunk; ``counts (chunks, E)``.

    ``slots (N, E)`` says where in the list of an expert a token stands, if it does.
    """
    chunk = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    place = tl.arange(0, CHUNK)
    token = chunk * CHUNK + place
    inside = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    at = token[:, None] * num_experts + expert[None, :]
    chosen = tl.load(mask + at, mask=inside, other=0).to(tl.int32)
    slot = tl.cumsum(chosen, axis=0) - 1  # (CHUNK, BLOCK_E)
    lists = rows + (chunk * num_experts + expert[None, :]) * CHUNK
    tl.store(lists + slot, tl.broadcast_to(place[:, None], (CHUNK, BLOCK_E)).to(tl.int16), mask=chosen != 0)
    if slots is not None:
        tl.store(slots + at, slot.to(tl.int16), mask=chosen != 0)
    tl.store(counts + chunk * num_experts + expert, tl.sum(chosen, axis=0), mask=expert < num_experts)


@jit
def up_listed(
    tokens, rows, counts, up_weight, up_bias, gate_weight, gate_bias, cutoff, gate_cutoff, hidden, num_experts,
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
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        token = chunk * CHUNK + tl.load(rows + place * CHUNK + slot, mask=slot < count, other=0)
        value = _activations(
            tokens, token, slot < count, up_weight, up_bias, gate_weight, gate_bias, cutoff, gate_cutoff, expert,
            neuron, D, S, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        to = hidden + token[:, None] * (num_experts * S) + (expert * S + neuron)[None, :]
        tl.store(to, value.to(hidden.dtype.element_ty), mask=(slot < count)[:, None] & (neuron < S)[None, :])


@jit
def down_listed(
    hidden, rows, counts, down_weight, pairs, first_chunk, num_experts,
    D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One expert, one chunk, ``BLOCK_N`` columns of its rows in ``pairs (chunks from the first, E, CHUNK, D)``."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N  # noqa: N806
    expert = tl.program_id(0) // D_BLOCKS
    chunk = first_chunk + tl.program_id(1).to(tl.int64)
    place = chunk * num_experts + expert
    count = tl.load(counts + place)
    column = tl.program_id(0) % D_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron = tl.arange(0, BLOCK_K)
    to = pairs + (tl.program_id(1).to(tl.int64) * num_experts + expert) * CHUNK * D + column[None, :]
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
        inside = (slot < count)[:, None] & (column < D)[None, :]
        tl.store(to + slot[:, None] * D, product.to(pairs.dtype.element_ty), mask=inside)


@jit
def both_listed(
    tokens, rows, counts, up_weight, up_bias, gate_weight, gate_bias, cutoff, gate_cutoff, down_weight, pairs,
    first_chunk, num_experts,
    D: tl.constexpr, S: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr, CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One expert of up to ``BLOCK_S`` neurons, one chunk: its rows in ``pairs``; activations stay in registers."""
    expert = tl.program_id(0)
    chunk = first_chunk + tl.program_id(1).to(tl.int64)
    place = chunk * num_experts + expert
    count = tl.load(counts + place)
    neuron = tl.arange(0, BLOCK_S)
    down_row = (expert.to(tl.int64) * S + neuron) * D_OUT
    to = pairs + (tl.program_id(1).to(tl.int64) * num_experts + expert) * CHUNK * D_OUT
    for first in range(0, count, BLOCK_M):
        slot = first + tl.arange(0, BLOCK_M)
        token = chunk * CHUNK + tl.load(rows + place * CHUNK + slot, mask=slot < count, other=0)
        value = _activations(
            tokens, token, slot < count, up_weight, up_bias, gate_weight, gate_bias, cutoff, gate_cutoff, expert,
            neuron, D, S, ACTIVATION, BLOCK_M, BLOCK_S, BLOCK_K,
        )  # fmt: skip
        hidden = tl.where((neuron < S)[None, :], value, 0.0).to(down_weight.dtype.element_ty)
        for n in range(0, D_OUT, BLOCK_N):
            out = n + tl.arange(0, BLOCK_N)
            w_mask = (neuron < S)[:, None] & (out < D_OUT)[None, :]
            w = tl.load(down_weight + down_row[:, None] + out[None, :], w_mask, 0.0)
            product = _multiply(hidden, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            inside = (slot < count)[:, None] & (out < D_OUT)[None, :]
            tl.store(to + slot[:, None] * D_OUT + out[None, :], product.to(pairs.dtype.element_ty), mask=inside)


@jit
def sum_pairs(
    pairs, mask, slots, down_bias, output, first_token, num_experts,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One token, ``BLOCK_D`` columns: what its experts gave, added up in float32, always in the same order.

    With ``BLOCK_E`` 1 experts that were not chosen are skipped, one after the other; else so many are looked at at
    once, which has less to wait for, and more to load in vain.
    """
    place = tl.program_id(0).to(tl.int64)
    token = first_token + place
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    lists = place // CHUNK * num_experts  # before those of this chunk
    for first in range(0, num_experts, BLOCK_E):
        if BLOCK_E == 1:
            if tl.load(mask + token * num_experts + first) != 0:
                row = (lists + first) * CHUNK + tl.load(slots + token * num_experts + first)
                total += tl.load(pairs + row * D + column, inside, 0.0).to(tl.float32)
        else:
            expert = first + tl.arange(0, BLOCK_E)
            at = token * num_experts + expert
            chosen = tl.load(mask + at, expert < num_experts, 0) != 0
            row = (lists + expert) * CHUNK + tl.load(slots + at, chosen, 0)
            terms = tl.load(pairs + row[:, None] * D + column[None, :], chosen[:, None] & inside[None, :], 0.0)
            total += tl.sum(terms.to(tl.float32), axis=0)
    if down_bias is not None:
        total += tl.load(down_bias + column, inside, 0.0).to(tl.float32)
    tl.store(output + token * D + column, total.to(output.dtype.element_ty), inside)


@jit
def activate_all(
    up, gate, mask, cutoff, gate_cutoff, num_experts,
    S: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """What the activation gives, in the place of ``up (N, WIDTH)``: of one token, ``BLOCK`` neurons; 0 off the mask."""
    token = tl.program_id(0).to(tl.int64)
    neuron = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < WIDTH
    at = token * WIDTH + neuron
    value = tl.load(up + at, inside, 0.0).to(tl.float32)
    if gate is not None:
        value = _cut(_activate(tl.load(gate + at, inside, 0.0).to(tl.float32), ACTIVATION), gate_cutoff) * value
    else:
        value = _activate(value, ACTIVATION)
    value = _cut(value, cutoff)
    value = tl.where(tl.load(mask + token * num_experts + neuron // S, inside, 0) != 0, value, 0.0)
    tl.store(up + at, value.to(up.dtype.element_ty), inside)
