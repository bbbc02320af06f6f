"""Targets against their naive twins, and the tensor that is never made."""

import pytest
import tiny
import torch
from ffns import make_ffn

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.routers import activation_sums, gram_matrices, output_norms


def test_norms_equal_those_of_the_expert_outputs():
    experts = Experts(make_ffn(10, 24), 4)
    hidden = experts.hidden(torch.randn(7, 10))  # (7, 4, 6)
    outputs = torch.einsum("nes,esd->ned", hidden, experts.down_weight)
    expected = outputs.norm(dim=-1)
    torch.testing.assert_close(output_norms(hidden, gram_matrices(experts.down_weight)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["float16", "autocast"])
def test_norms_that_a_narrow_type_holds_but_not_their_squares(way):
    experts = Experts(make_ffn(10, 24), 4)
    hidden = 3000 * experts.hidden(torch.randn(7, 10))
    gram = gram_matrices(experts.down_weight)
    expected = output_norms(hidden, gram)
    assert 256 < expected.max() < 60_000
    if way == "float16":
        found = output_norms(hidden.half(), gram.half())
    else:
        with torch.autocast("cpu", torch.float16):
            found = output_norms(hidden, gram)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1.0)


def test_norm_of_silent_experts_is_zero_and_not_nan():
    experts = Experts(make_ffn(10, 24), 4)
    norms = output_norms(torch.zeros(3, 4, 6), gram_matrices(experts.down_weight))
    assert norms.tolist() == [[0.0] * 4] * 3


def test_no_tensor_of_experts_by_tokens_by_width():
    tokens, num_experts, d_model = 11, 4, 17
    experts = Experts(make_ffn(d_model, 24), num_experts)
    hidden = experts.hidden(torch.randn(tokens, d_model))
    gram = gram_matrices(experts.down_weight)
    with tiny.Shapes() as shapes:
        output_norms(hidden, gram)
    assert shapes.seen
    assert tuple(sorted((num_experts, tokens, d_model))) not in shapes.seen
    assert all(torch.Size(shape).numel() <= hidden.numel() for shape in shapes.seen)


def test_activation_sums_are_scaled_to_one():
    hidden = torch.rand(5, 3, 4)
    sums = activation_sums(hidden)
    torch.testing.assert_close(sums, hidden.sum(dim=-1) / hidden.sum(dim=-1).max())
    assert activation_sums(torch.zeros(2, 3, 4)).tolist() == [[0.0] * 3] * 2
