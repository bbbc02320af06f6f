"""Attention over short sequences on the CPU, against ATen's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from d2dmoe_pl.moe.execution.cpu import compile_failure

pytestmark = pytest.mark.skipif(compile_failure() is not None, reason="the CPU kernel cannot be compiled here")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NONE = -torch.inf


ROUNDED = 2e-2  # where products may be of integers of 12 bits


def attention(query, key, value, mask=None, scale=None, rounds=False):
    return torch.ops.d2dmoe_pl.attention_cpu.default(query, key, value, mask, scale, rounds)


def heads(batch, length, num_heads, width, dtype=torch.float32):
    """As models have them: what a linear layer gave for each token, seen head by head."""
    return torch.randn(batch, length, num_heads, width).to(dtype).transpose(1, 2)


def masks(kind, batch, num_heads, queries, keys):
    lengths = torch.randint(0, keys + 1, (batch, 1, 1, 1))
    seen = torch.arange(keys) < lengths  # (B, 1, 1, keys)
    padding = torch.where(seen, 0.0, NONE)
    return {
        "none": None,
        "padding": padding.expand(batch, 1, queries, keys),
        "padding in memory": padding.expand(batch, 1, queries, keys).contiguous(),
        "any": torch.where(torch.rand(batch, 1, queries, keys) < 0.5, 0.0, NONE),
        "of heads": torch.randn(batch, num_heads, queries, keys),
        "of all": torch.randn(1, 1, queries, keys),
        "transposed": torch.randn(batch, 1, keys, queries).transpose(2, 3),
    }[kind]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    queries=st.integers(1, 140),
    keys=st.integers(1, 200),
    width=st.sampled_from([8, 16, 32, 48, 80, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([None, 0.3]),
    kind=st.sampled_from(["none", "padding", "padding in memory", "any", "of heads", "of all", "transposed"]),
    rounds=st.booleans(),
)
@torch.inference_mode()
def test_equals_atens(seed, batch, num_heads, queries, keys, width, dtype, scale, kind, rounds):
    torch.manual_seed(seed)
    query, key, value = (heads(batch, length, num_heads, width, dtype) for length in (queries, keys, keys))
    mask = masks(kind, batch, num_heads, queries, keys)
    mask = None if mask is None else mask.to(dtype)
    expected = scaled_dot_product_attention(
        *(x.float() for x in (query, key, value)), None if mask is None else mask.float(), scale=scale
    )
    got = attention(query, key, value, mask, scale, rounds)
    assert got.dtype == dtype
    assert got.transpose(1, 2).is_contiguous()
    tolerance = ROUNDED if rounds else TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def test_rounding_is_finer_than_bfloat16():
    torch.manual_seed(0)
    query, key, value = (heads(2, 200, 4, 64) for _ in range(3))
    key += 8 * torch.randn(64)  # as some channels have
    value *= torch.randn(64).exp()
    expected = scaled_dot_product_attention(query, key, value)
    rounded = attention(query, key, value, rounds=True) - expected
    narrow = scaled_dot_product_attention(*(x.bfloat16() for x in (query, key, value))).float() - expected
    assert rounded.norm() < narrow.norm() / 2


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_what_one_sample_holds_shows_in_no_other(dtype, rounds):
    """Work space is used again: what is left in it by a longer sample must not count."""
    query, key, value = (heads(3, 30, 2, 32, dtype) for _ in range(3))
    lengths = torch.tensor([30, 18, 3]).view(3, 1, 1, 1)
    mask = torch.where(torch.arange(30) < lengths, 0.0, NONE).to(dtype)  # (3, 1, 1, 30)
    before = attention(query, key, value, mask, rounds=rounds)
    key[0], value[0] = torch.nan, torch.inf
    after = attention(query, key, value, mask, rounds=rounds)
    assert torch.isnan(after[0]).all()
    assert torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("rounds", [False, True])
@torch.inference_mode()
def test_no_key_gives_zeros_and_what_is_not_a_number_shows(rounds):
    query, key, value = (heads(2, 5, 3, 32) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, 0, 2], mask[1] = NONE, NONE
    query[0, 1, 4, 0] = torch.nan
    got = attention(query, key, value, mask, rounds=rounds)
    assert not got[0, :, 2].any()
    assert not got[1].any()
    assert torch.isnan(got[0, 1, 4]).all()
    assert torch.isnan(got).sum() == 32
    query[0, 1, 4, 0] = torch.inf
    assert not torch.isfinite(attention(query, key, value, mask, rounds=rounds)[0, 1, 4]).any()


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((1, 4, 300, 16), (1, 4, 300, 16), (1, 4, 300, 16)),  # long
        ((1, 4, 2, 16), (1, 4, 9, 16), (1, 4, 9, 16)),  # few queries
        ((1, 4, 9, 12), (1, 4, 7, 12), (1, 4, 7, 12)),  # a width that no tile has
        ((1, 4, 9, 272), (1, 4, 7, 272), (1, 4, 7, 272)),
    ],
)
@torch.inference_mode()
def test_what_the_kernel_has_not_is_atens(query, key, value):
    query, key, value = (torch.randn(shape) for shape in (query, key, value))
    expected = scaled_dot_product_attention(query, key, value)
    got = attention(query, key, value)
    torch.testing.assert_close(got, expected)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_heads_beside_something_else_in_memory(dtype):
    whole = torch.randn(3, 2, 4, 20, 33).to(dtype)  # rows of an odd number of numbers
    query, key, value = whole[..., :32]
    expected = scaled_dot_product_attention(query.float(), key.float(), value.float())
    torch.testing.assert_close(attention(query, key, value).float(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rounds", [False, True])
@torch.inference_mode()
def test_threads_change_nothing(rounds):
    query, key, value = (heads(3, 70, 2, 32) for _ in range(3))
    threads = torch.get_num_threads()
    try:
        given = []
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            given.append(attention(query, key, value, rounds=rounds))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])


def test_operator_is_well_formed():
    query, key, value = (heads(2, 5, 3, 32) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5)
    torch.library.opcheck(torch.ops.d2dmoe_pl.attention_cpu, (query, key, value, mask, None, True))
