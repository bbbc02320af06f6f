"""The CPU's two ways to run experts: each by itself, or all at once under a mask, whichever is faster."""

from itertools import product

import pytest
import torch
from ffns import experts_of as experts_and_tokens
from ffns import ffn_of
from int8_twins import nearest_twin, needs_int8, twin_at_once
from torch import nn

from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.moe.execution.cpu import compile_failure, cpu
from d2dmoe_pl.moe.execution.reference import reference
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.quantization.int8_experts import Int8Experts

pytestmark = pytest.mark.skipif(compile_failure() is not None, reason="the CPU kernel cannot be compiled here")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def experts_of(num_experts, expert_dim, dtype, gated=False, bias=True, activation=None, d_model=64):
    torch.manual_seed(0)
    width = num_experts * expert_dim
    up, down = nn.Linear(d_model, width, bias=bias), nn.Linear(width, d_model, bias=bias)
    gate = {"gate_proj": nn.Linear(d_model, width, bias=bias)} if gated else {}
    ffn = FFN(name="ffn", up=up, activation=activation or nn.ReLU(), down=down, **gate)
    return Experts(ffn, num_experts).to(dtype)


@pytest.mark.parametrize(
    ("gated", "bias", "dtype"), product([False, True], [False, True], [torch.float32, torch.bfloat16])
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Tanh()])
@torch.inference_mode()
def test_equals_reference_whichever_way_it_takes(gated, bias, dtype, activation):
    experts = experts_of(2048, 2, dtype, gated, bias, activation)
    for tokens, share in product([1, 7, 90], [0.0, 0.02, 0.5, 1.0]):
        x, mask = torch.randn(tokens, 64, dtype=dtype), torch.rand(tokens, 2048) < share
        expected = reference(experts, x, mask)
        torch.testing.assert_close(cpu(experts, x, mask), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_experts", "expert_dim", "share", "is_dense"),
    [(8192, 1, 1.0, True), (8192, 1, 0.5, True), (64, 128, 1.0, True), (64, 128, 0.1, False), (16, 512, 0.2, False)],
)
@torch.inference_mode()
def test_all_at_once_where_that_is_faster(dtype, num_experts, expert_dim, share, is_dense):
    """Of ReLU without bias it gives the bits of the plain twin; experts by themselves are added in another order."""
    experts = experts_of(num_experts, expert_dim, dtype, bias=False, d_model=128)
    x, mask = torch.randn(700, 128, dtype=dtype), torch.rand(700, num_experts) < share
    got, plain = cpu(experts, x, mask), reference(experts, x, mask)
    exact = reference(experts.float(), x.float(), mask).to(dtype)  # of CPUs that multiply bf16 in fp32
    assert (torch.equal(got, plain) or torch.equal(got, exact)) == is_dense


@pytest.mark.parametrize("tokens", [2, 90])
@pytest.mark.parametrize("odd", ["up_weight", "gate_weight", "down_weight", "down_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_one_weight_of_another_type(tokens, odd, dtype):
    experts = experts_of(2048, 2, dtype, gated=True)
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    setattr(experts, odd, nn.Parameter(getattr(experts, odd).to(other)))
    x, mask = torch.randn(tokens, 64, dtype=dtype), torch.rand(tokens, 2048) < 0.9
    found = torch.ops.d2dmoe_pl.moe_cpu(x, mask, experts.weights, experts.activation_kind)
    assert found.dtype == dtype
    expected = reference(experts.float(), x.float(), mask)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@torch.inference_mode()
def test_more_tokens_than_are_taken_at_once():
    experts = experts_of(512, 1, torch.float32, gated=True, d_model=32)
    x, mask = torch.randn(2500, 32), torch.rand(2500, 512) < 0.5
    torch.testing.assert_close(cpu(experts, x, mask), reference(experts, x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_what_is_not_chosen_is_not_seen(threads):
    """Weights that are infinite, and what they make of tokens, are as good as not there."""
    experts = experts_of(8192, 1, torch.float32)
    with torch.no_grad():
        experts.up_weight[::2] = torch.inf
    x, mask = torch.randn(40, 64), torch.ones(40, 8192, dtype=torch.bool)
    mask[:, ::2] = False
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert cpu(experts, x, mask).isfinite().all()
    finally:
        torch.set_num_threads(before)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "density", "at_once"),
    [
        ({"num_experts": 128, "expert_dim": 12}, 0.95, True),
        ({"num_experts": 192, "expert_dim": 3, "gated": True, "activation": "silu"}, 0.95, True),
        ({"num_experts": 64, "expert_dim": 32, "activation": "gelu", "d_out": 70}, 1.0, True),
        ({"num_experts": 64, "expert_dim": 33, "bias": False}, 1.0, True),
        ({"num_experts": 16, "expert_dim": 128}, 0.05, False),
    ],
)
@torch.no_grad()
def test_int8_all_at_once_where_that_is_faster(sizes, density, at_once, dtype):
    torch.manual_seed(0)
    case = {"tokens": 300, "d_model": 128, "d_out": 128, "bias": True, "gated": False, "activation": "relu", **sizes}
    experts, tokens, mask = experts_and_tokens({**case, "density": density}, "cpu")
    int8, tokens = Int8Experts(experts), tokens.to(dtype)
    got = int8(tokens, mask).double()
    expected = twin_at_once(int8, tokens.float(), mask)
    tolerance = (0.003 if dtype == torch.float32 else 0.006) * expected.norm()
    assert ((got - expected).norm() < tolerance) == at_once
    assert (got - nearest_twin(int8, tokens.float(), mask, got)).norm() < tolerance


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_int8_that_is_not_chosen_is_not_seen(threads):
    """What an expert that a token did not choose would make of it, if it be infinite, is as good as not there."""
    torch.manual_seed(0)
    case = {"num_experts": 128, "expert_dim": 12, "d_model": 128, "d_out": None, "gated": False, "bias": True}
    int8 = Int8Experts(Experts(ffn_of({**case, "activation": "relu"}), 128))
    int8.up_bias[::2] = torch.inf
    mask = (torch.arange(128) % 2 == 1).expand(90, 128).contiguous()
    tokens = torch.randn(90, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = int8(tokens, mask)
        int8.up_bias[::2] = 0.0
        assert torch.equal(got, int8(tokens, mask))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_int8_that_changes_is_seen():
    torch.manual_seed(0)
    case = {"tokens": 90, "num_experts": 128, "expert_dim": 12, "d_model": 128, "d_out": 128, "bias": False}
    experts, tokens, mask = experts_and_tokens({**case, "gated": False, "activation": "relu", "density": 1.0}, "cpu")
    int8 = Int8Experts(experts)
    before = int8(tokens, mask)
    int8.down_scale *= 2
    torch.testing.assert_close(int8(tokens, mask), 2 * before)
    int8.down_weight.neg_()
    torch.testing.assert_close(int8(tokens, mask), -2 * before)


@needs_int8
@torch.no_grad()
def test_int8_of_an_expert_far_larger_than_others():
    """One scale a column for all would leave nothing of the others, so that each is computed by itself."""
    torch.manual_seed(0)
    case = {"tokens": 300, "num_experts": 128, "expert_dim": 12, "d_model": 128, "d_out": 128, "bias": True}
    experts, tokens, mask = experts_and_tokens({**case, "gated": False, "activation": "relu", "density": 1.0}, "cpu")
    experts.down_weight[0] *= 1000
    mask[:, 0] = False
    int8 = Int8Experts(experts)
    got, expected = int8(tokens, mask), reference(experts, tokens, mask)
    assert (got - expected).norm() < 0.02 * expected.norm()
    int8.down_scale[0] = torch.inf
    assert torch.equal(int8(tokens, mask), got)
