"""int8 computes what its plain twin does, and stays near what it was made from."""

import pytest
import torch
from ffns import cases, experts_of, ffn_of
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_twins import FEW, HAS_VNNI, ROUNDS, nearest_twin, needs_int8, rounded
from torch import nn

from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.quantization.int8_experts import Int8Experts
from d2dmoe_pl.moe.quantization.int8_layers import Int8Embedding, Int8Linear, quantized


@needs_int8
@given(cases(120, 9, 150, 150))
@settings(deadline=None, max_examples=80)
@torch.no_grad()
def test_experts_equal_the_plain_twin(case):
    torch.manual_seed(case["seed"])
    experts, tokens, mask = experts_of(case, "cpu")
    int8 = Int8Experts(experts)
    got = int8(tokens, mask).double()
    expected = nearest_twin(int8, tokens, mask, got)
    scale = max(1e-3, expected.abs().max().item()) if expected.numel() else 1.0
    # float32 now and then rounds to the neighbouring step
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=0.02)
    assert (got - expected).square().mean().sqrt() <= 0.003 * scale or not expected.numel()


@needs_int8
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("expert_dim", [6, 32, 64, 100, 200])
@pytest.mark.parametrize("d_out", [640, 700])
@torch.no_grad()
def test_outputs_larger_than_a_cache(d_out, expert_dim, activation):
    """They are added to a few columns at a time."""
    torch.manual_seed(0)
    case = {"tokens": 300, "num_experts": 5, "expert_dim": expert_dim, "d_model": 30, "d_out": d_out, "bias": True}
    experts, tokens, mask = experts_of(case | {"gated": False, "activation": activation, "density": 0.3}, "cpu")
    mask[:, 1] = False
    mask[:, 2] = torch.arange(300) == 7  # one token alone
    int8 = Int8Experts(experts)
    got = int8(tokens, mask).double()
    torch.testing.assert_close(got, nearest_twin(int8, tokens, mask, got), rtol=0, atol=4e-3)


@pytest.mark.parametrize("backend", ["auto", "cpu", "grouped", "reference"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_experts_are_near_what_they_were_made_from(backend, gated, dtype):
    torch.manual_seed(0)
    case = {"num_experts": 6, "expert_dim": 40, "d_model": 96, "d_out": None, "gated": gated, "bias": True}
    experts, tokens, mask = experts_of({**case, "tokens": 70, "activation": "gelu", "density": 0.4}, backend)
    got = Int8Experts(experts)(tokens.to(dtype), mask)
    expected = experts(tokens, mask)
    assert got.dtype == dtype
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.skipif(HAS_VNNI, reason="with AVX-512 VNNI tokens are rounded")
@pytest.mark.parametrize("tokens", [1, 3, FEW] if ROUNDS else [1, 3, FEW, FEW + 1])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_vnni_tokens_are_not_rounded(tokens, gated, dtype):
    """A handful is multiplied with the numbers as they are, more with a copy of them."""
    torch.manual_seed(0)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    for sizes in ({"expert_dim": 5, "d_model": 37, "d_out": 19}, {"expert_dim": 33, "d_model": 96, "d_out": 70}):
        case = {"num_experts": 6, "gated": gated, "bias": True, "activation": "silu", "density": 0.5, **sizes}
        experts, x, mask = experts_of({**case, "tokens": tokens}, "cpu")
        int8 = Int8Experts(experts)
        got = int8(x.to(dtype), mask)
        assert got.dtype == dtype
        int8.set_backend("reference")
        torch.testing.assert_close(got.float(), int8(x, mask), **tolerance)
        linear = nn.Linear(sizes["d_model"], sizes["d_out"])
        rounded_linear = Int8Linear(linear.weight, linear.bias)
        weight = rounded_linear.weight.float() * rounded_linear.scale.unsqueeze(1)
        expected = nn.functional.linear(x, weight, linear.bias)
        torch.testing.assert_close(rounded_linear(x.to(dtype)).float(), expected, **tolerance)


@pytest.mark.parametrize("expert_dim", [4, 40])
@pytest.mark.parametrize("number", [3, 9, 40])
@torch.no_grad()
def test_a_nan_shows(number, expert_dim):
    """In its own row and in no other, whether rows are rounded or not."""
    int8 = Int8Experts(Experts(ffn_of({**CASE, "expert_dim": expert_dim}), 3))
    tokens = torch.randn(number, 6)
    tokens[1, 2] = torch.nan
    expected = [row == 1 for row in range(number)]
    got = int8(tokens, torch.ones(number, 3, dtype=torch.bool))
    assert got.isnan().all(dim=1).tolist() == got.isnan().any(dim=1).tolist() == expected
    linear = Int8Linear(torch.randn(5, 6), None)
    assert linear(tokens).isnan().all(dim=1).tolist() == linear(tokens).isnan().any(dim=1).tolist() == expected


CASE = {"num_experts": 3, "expert_dim": 4, "d_model": 6, "d_out": None, "gated": False, "bias": True}
CASE = {**CASE, "activation": "relu"}


@given(
    st.integers(0, 600), st.integers(1, 150), st.integers(1, 150), st.booleans(), st.booleans(), st.integers(0, 2**31)
)
@settings(deadline=None, max_examples=80)
@torch.no_grad()
def test_a_linear_layer_equals_its_plain_twin(rows, d_in, d_out, has_bias, in_bfloat16, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias=has_bias)
    int8 = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(rows, d_in).to(torch.bfloat16 if in_bfloat16 else torch.float32)
    weight = int8.weight.double() * int8.scale.double().unsqueeze(1)
    expected = rounded(x.float(), 127).double() @ weight.t() + (0 if linear.bias is None else linear.bias.double())
    got = int8(x)
    assert got.dtype == x.dtype
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=0.02)


@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_the_largest_numbers_do_not_saturate(rows):
    """Sums of pairs of them are more than 16 bits hold."""
    x = torch.ones(rows, 999)
    torch.testing.assert_close(Int8Linear(torch.ones(70, 999), None)(x), torch.full((rows, 70), 999.0))
    torch.testing.assert_close(Int8Linear(-torch.ones(70, 999), None)(-x), torch.full((rows, 70), 999.0))
    ffn = FFN("ffn", nn.Linear(999, 40, bias=False), nn.ReLU(), nn.Linear(40, 17, bias=False))
    for weight in (ffn.up.weight, ffn.down.weight):
        weight.fill_(1.0)
    got = Int8Experts(Experts(ffn, 2))(x, torch.ones(rows, 2, dtype=torch.bool))
    torch.testing.assert_close(got, torch.full((rows, 17), 40 * 999.0))


@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_a_linear_layer_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        linear = nn.Linear(100, 333)
        int8 = Int8Linear(linear.weight, linear.bias)
        for rows in (1, 64, 500, 1100):
            x = torch.randn(rows, 100)
            assert (int8(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_what_was_written_to_a_weight_is_seen():
    linear = Int8Linear(torch.randn(5, 8), None)
    x = torch.randn(2, 8)
    before = linear(x)
    linear.weight.mul_(-1)
    torch.testing.assert_close(linear(x), -before)
    linear.scale.mul_(2)
    torch.testing.assert_close(linear(x), -2 * before)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("name", ["up_scale", "down_scale"])
def test_what_was_written_to_a_scale_of_experts_is_seen(name, share):
    """Also where copies of the weights are multiplied out, of experts one by one or of all at once."""
    torch.manual_seed(0)
    ffn = FFN("ffn", nn.Linear(64, 2048, bias=False), nn.ReLU(), nn.Linear(2048, 64, bias=False))
    experts = Int8Experts(Experts(ffn, 512))
    x, mask = torch.randn(100, 64), torch.rand(100, 512) < share
    before = experts(x, mask)
    getattr(experts, name).mul_(2)
    torch.testing.assert_close(experts(x, mask), 2 * before, rtol=1e-2, atol=1e-2 * before.abs().max().item())


def test_gradients_pass_through_a_linear_layer():
    linear = Int8Linear(torch.randn(5, 8), torch.randn(5))
    x = torch.randn(2, 8, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, (linear.weight * linear.scale.unsqueeze(1)).sum(0).expand(2, 8))


def test_what_was_cast_to_the_type_of_the_weights_is_told():
    linear, x = Int8Linear(torch.randn(3, 8), None), torch.randn(5, 8)
    with pytest.raises(
        ConfigError, match=r"^in int8: a linear layer of 8 inputs is given torch.int8, as its model casts"
    ):
        linear(x.to(linear.weight.dtype))


def test_an_embedding():
    embedding = nn.Embedding(7, 16)
    int8, ids = Int8Embedding(embedding), torch.tensor([[0, 6], [3, 3]])
    torch.testing.assert_close(int8(ids), embedding(ids), rtol=0, atol=embedding.weight.abs().max().item() / 250)
    assert int8.bfloat16()(ids).dtype == torch.bfloat16


def test_scales_stay_exact_in_whatever_type():
    experts = Int8Experts(Experts(ffn_of(CASE), 3))
    before = experts.up_scale.clone()
    experts.bfloat16()
    assert torch.equal(experts.up_scale, before)
    assert experts.up_bias.dtype == torch.bfloat16
    assert experts.up_weight.dtype == torch.int8


def test_rounding():
    weight = torch.randn(4, 6, 9)
    for dim in (1, 2):
        numbers, scale = quantized(weight, dim)
        assert numbers.abs().amax(dim=dim).eq(127).all()
        assert ((numbers * scale.unsqueeze(dim) - weight).abs() <= scale.unsqueeze(dim) * 0.5001).all()
    assert not quantized(torch.zeros(2, 3), 1)[0].any()
