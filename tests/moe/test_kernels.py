"""The contract of every kernel: the function of the plain twin, outputs and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2dmoe_pl import plugins
from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe import kernels
from d2dmoe_pl.moe.experts import Experts

KERNELS = [name for name in plugins.names(kernels) if name != "triton"]  # has no gradients: test_triton.py


def make_ffn(d_model, d_ff, gated=False, bias=True, activation=nn.ReLU):
    return FFN(
        name="ffn",
        up=nn.Linear(d_model, d_ff, bias=bias),
        activation=activation(),
        down=nn.Linear(d_ff, d_model, bias=bias),
        gate=nn.Linear(d_model, d_ff, bias=bias) if gated else None,
    )


def naive(ffn, assignment, tokens, mask):
    """One expert, one token at a time, straight from the dense weights."""
    output = torch.zeros_like(tokens)
    for token in range(len(tokens)):
        neurons = mask[token][assignment]  # (d_ff,)
        hidden = ffn.up(tokens[token])
        hidden = ffn.activation(hidden) if ffn.gate is None else ffn.activation(ffn.gate(tokens[token])) * hidden
        output[token] = ffn.down(torch.where(neurons, hidden, 0.0))
    return output


@st.composite
def cases(draw):
    return {
        "tokens": draw(st.integers(0, 9)),
        "num_experts": draw(st.integers(1, 6)),
        "expert_dim": draw(st.integers(1, 5)),
        "d_model": draw(st.integers(1, 7)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])),
        "density": draw(st.sampled_from([0.0, 0.2, 1.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.parametrize("backend", KERNELS)
class TestContract:
    @given(cases())
    @settings(deadline=None, max_examples=60)
    def test_equals_the_naive_twin_in_output_and_gradients(self, backend, case):
        torch.manual_seed(case["seed"])
        d_ff = case["num_experts"] * case["expert_dim"]
        ffn = make_ffn(case["d_model"], d_ff, case["gated"], case["bias"], case["activation"])
        assignment = torch.randperm(d_ff) % case["num_experts"]
        experts = Experts(ffn, case["num_experts"], assignment, backend)
        mask = torch.rand(case["tokens"], case["num_experts"]) < case["density"]
        start = torch.randn(case["tokens"], case["d_model"])
        results = []
        for function, weight in (
            (lambda x: naive(ffn, assignment, x, mask), ffn.up.weight),
            (lambda x: experts(x, mask), experts.up_weight),
        ):
            tokens = start.clone().requires_grad_()
            output = function(tokens)
            # the product with zero keeps the graph whole where nothing runs
            (output.square().sum() + 0 * tokens.sum() + 0 * weight.sum()).backward()
            results.append((output, tokens.grad, weight.grad))
        expected, got = results
        in_order = expected[2][assignment.argsort(stable=True)].view_as(got[2])
        for a, b in zip((*expected[:2], in_order), got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

    def test_all_tokens_on_one_expert(self, backend):
        ffn = make_ffn(6, 12)
        mask = torch.zeros(5, 3, dtype=torch.bool)
        mask[:, 1] = True
        tokens = torch.randn(5, 6)
        got = Experts(ffn, 3, None, backend)(tokens, mask)
        torch.testing.assert_close(got, naive(ffn, torch.arange(12) // 4, tokens, mask))

    def test_nan_in_gives_nan_out(self, backend):
        tokens = torch.randn(3, 6)
        tokens[1, 2] = torch.nan
        got = Experts(make_ffn(6, 12), 3, None, backend)(tokens, torch.ones(3, 3, dtype=torch.bool))
        assert got.isnan().any(dim=1).tolist() == [False, True, False]

    def test_runs_under_autocast(self, backend):
        experts = Experts(make_ffn(6, 12), 3, None, backend)
        tokens, mask = torch.randn(4, 6), torch.rand(4, 3) < 0.5
        with torch.autocast("cpu", torch.bfloat16):
            got = experts(tokens, mask)
        torch.testing.assert_close(got.float(), experts(tokens, mask), rtol=0.05, atol=0.05)


def test_unknown_backend():
    with pytest.raises(ConfigError, match="backend='abacus': allowed are grouped, reference, triton"):
        Experts(make_ffn(4, 4), 2, None, "abacus")


def test_unbalanced_assignment():
    with pytest.raises(ConfigError, match="assignment of ffn: must give each of the 2 experts exactly 2 neurons"):
        Experts(make_ffn(4, 4), 2, torch.tensor([0, 0, 0, 1]))


def test_grouped_computes_executed_pairs_only():
    """Checked where it counts: the rows that enter each expert's products."""
    experts = Experts(make_ffn(6, 12), 3, None, "grouped")
    rows = []
    experts.activation.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    mask = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    experts(torch.randn(3, 6), mask)
    assert rows == [2, 1]
