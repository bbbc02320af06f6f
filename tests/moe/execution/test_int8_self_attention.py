"""Self-attention with its linear layers in int8, against these and then ATen's own attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from d2dmoe_pl.moe.execution.cpu import compile_failure

pytestmark = pytest.mark.skipif(compile_failure() is not None, reason="the CPU kernel cannot be compiled here")
NONE = -torch.inf
TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 8e-2}


def layers(d_in, outputs, number=3, bias=True):
    """Weights, scales and biases of linear layers in int8, whose outputs are around one."""
    weights = [torch.randint(-127, 128, (outputs, d_in), dtype=torch.int8) for _ in range(number)]
    scales = [(0.5 + torch.rand(outputs)) / 73 / d_in**0.5 for _ in range(number)]
    return weights, scales, [torch.randn(outputs) if bias else None for _ in range(number)]


def side_by_side(weights, scales, biases):
    """One layer in the place of three."""
    return [torch.cat(weights)], [torch.cat(scales)], [None if biases[0] is None else torch.cat(biases)]


def self_attention(x, given, heads, mask=None, scale=None):
    return torch.ops.d2dmoe_pl.int8_self_attention_cpu.default(x, *given, heads, mask, scale)


def step_by_step(x, given, heads, mask=None, scale=None):
    batch, length, _ = x.shape
    rows = torch.ops.d2dmoe_pl.int8_linears_cpu.default(x.reshape(batch * length, -1), *given).float()
    parts = rows.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)
    return scaled_dot_product_attention(*parts, None if mask is None else mask.float(), scale=scale)


def padding(batch, length, dtype=torch.float32):
    lengths = torch.randint(1, length + 1, (batch, 1, 1, 1))
    return torch.where(torch.arange(length) < lengths, 0.0, NONE).to(dtype)  # (B, 1, 1, L)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    length=st.integers(1, 280),
    width=st.sampled_from([8, 16, 32, 48, 80]),
    d_in=st.sampled_from([4, 24, 30, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([None, 0.3]),
    kind=st.sampled_from(["none", "padding", "of heads", "of all"]),
    bias=st.booleans(),
)
@torch.inference_mode()
def test_equals_linear_layers_and_then_attention(seed, batch, heads, length, width, d_in, dtype, scale, kind, bias):
    torch.manual_seed(seed)
    x = torch.randn(batch, length, d_in).to(dtype)
    given = layers(d_in, heads * width, bias=bias)
    mask = {
        "none": None,
        "padding": padding(batch, length, dtype),
        "of heads": torch.randn(batch, heads, length, length).to(dtype),
        "of all": torch.randn(1, 1, length, length).to(dtype),
    }[kind]
    got = self_attention(x, given, heads, mask, scale)
    assert got.dtype == dtype
    assert got.transpose(1, 2).is_contiguous()
    expected = step_by_step(x.float(), given, heads, mask, scale)
    tolerance = TOLERANCE[dtype]
    assert (got.float() - expected).norm() <= tolerance * expected.norm()
    # of many numbers one may be further off, where two keys weigh about the same
    torch.testing.assert_close(got.float(), expected, rtol=3 * tolerance, atol=3 * tolerance)
    torch.testing.assert_close(self_attention(x, side_by_side(*given), heads, mask, scale), got)


@torch.inference_mode()
def test_what_one_sample_holds_shows_in_no_other():
    x, given = torch.randn(3, 30, 64), layers(64, 64)
    mask = torch.where(torch.arange(30) < torch.tensor([30, 18, 3]).view(3, 1, 1, 1), 0.0, NONE)
    before = self_attention(x, given, 2, mask)
    x[0] = torch.nan
    after = self_attention(x, given, 2, mask)
    assert torch.isnan(after[0]).all()
    assert torch.equal(after[1:], before[1:])
    x[1, 18:], x[2, 3:] = 9.0, -9.0  # what is padding is a query alone
    padded = self_attention(x, given, 2, mask)
    assert torch.equal(padded[1, :, :18], before[1, :, :18])
    assert torch.equal(padded[2, :, :3], before[2, :, :3])


@torch.inference_mode()
def test_no_key_gives_zeros():
    mask = torch.zeros(2, 1, 1, 9)
    mask[1] = NONE
    got = self_attention(torch.randn(2, 9, 32), layers(32, 64), 2, mask)
    assert got[0].all()
    assert not got[1].any()


@torch.inference_mode()
def test_threads_change_nothing():
    x, given = torch.randn(3, 70, 64), layers(64, 128)
    threads = torch.get_num_threads()
    try:
        made = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            made.append(self_attention(x, given, 8))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("shape", "given", "heads", "message"),
    [
        ((5, 32), layers(32, 64), 2, r"x has shape \[5, 32\], not \(B, L, D\)"),
        ((2, 5, 32), layers(32, 64, 2), 2, "there must be one linear layer, or three"),
        ((2, 5, 32), layers(32, 64), 3, "heads=3: must part the outputs"),
        ((2, 5, 32), layers(32, 64), 0, "heads=0: must be positive"),
        ((2, 5, 32), (*layers(32, 64)[:2], [None]), 2, "one scale and bias a weight"),
        ((2, 5, 32), layers(16, 64), 2, "x is 32 wide, not 16"),
    ],
)
def test_what_does_not_fit(shape, given, heads, message):
    with pytest.raises(ValueError, match=message):
        self_attention(torch.randn(shape), given, heads)


def test_operator_is_well_formed():
    given = (torch.randn(2, 5, 32), *layers(32, 64), 2, torch.zeros(2, 1, 5, 5), None)
    torch.library.opcheck(torch.ops.d2dmoe_pl.int8_self_attention_cpu, given)
