"""The contract of every kernel: the function of the plain twin, and gradients where it has any."""

import copy

import pytest
import torch
from ffns import ACTIVATIONS, TOLERANCE, assert_close, cases, experts_of, ffn_of, in_a_gap, make_ffn
from hypothesis import given, settings
from torch import nn

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.execution import BACKENDS
from d2dmoe_pl.moe.experts.experts import Experts

DIFFERENTIABLE = ["auto", "grouped", "reference"]
ON_CPU = [*DIFFERENTIABLE, "cpu"]


def naive(ffn, assignment, tokens, mask):
    """One expert, one token at a time, straight from the dense weights."""
    output = torch.zeros(len(tokens), ffn.down.out_features)
    for token in range(len(tokens)):
        neurons = mask[token][assignment]  # (d_ff,)
        hidden = ffn.up(tokens[token])
        hidden = (
            ffn.activation(hidden) if ffn.gate_proj is None else ffn.activation(ffn.gate_proj(tokens[token])) * hidden
        )
        output[token] = ffn.down(torch.where(neurons, hidden, 0.0))
    return output


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@given(cases(9, 6, 5, 7))
@settings(deadline=None, max_examples=60)
def test_equals_the_naive_twin_in_output_and_gradients(backend, case):
    torch.manual_seed(case["seed"])
    ffn = ffn_of(case)
    assignment = torch.randperm(ffn.d_ff) % case["num_experts"]
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
@given(cases(150, 9, 70, 150))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_equals_reference_in_inference(backend, dtype, case):
    torch.manual_seed(case["seed"])
    experts, tokens, mask = experts_of(case, backend)
    experts, tokens = experts.to(dtype), tokens.to(dtype)
    got = experts(tokens, mask)
    experts.double().set_backend("reference")
    expected = experts(tokens.double(), mask)
    assert got.dtype == dtype
    # where terms cancel, what is rounded off them is as large as ever: the terms are the measure
    hidden = experts.hidden(tokens.double()).abs() * mask.unsqueeze(-1)  # (N, E, s)
    terms = hidden.flatten(1) @ experts.down_weight.abs().flatten(0, 1)  # (N, d)
    scale = (expected.abs() + terms).max().clamp(min=1e-3).item() if expected.numel() else 1.0
    assert_close(got.double() / scale, expected / scale, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ON_CPU)
@given(cases(150, 9, 70, 150))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_leaves_small_activations_out(backend, dtype, case):
    torch.manual_seed(case["seed"])
    experts, tokens, mask = experts_of(case, backend)
    experts, tokens = experts.to(dtype), tokens.to(dtype)
    twin = copy.deepcopy(experts).double()
    of_gates = torch.tensor(in_a_gap(twin.gates(tokens.double()))) if case["gated"] else None
    hidden = twin.hidden(tokens.double(), of_gates)  # (N, E, s)
    cutoff = in_a_gap(hidden)
    got = experts(tokens, mask, torch.tensor(cutoff), of_gates)
    kept = hidden * (hidden.abs() >= cutoff) * mask.unsqueeze(-1)
    expected = twin.combine(kept)
    terms = kept.abs().flatten(1) @ twin.down_weight.abs().flatten(0, 1)  # (N, d)
    scale = (expected.abs() + terms).max().clamp(min=1e-3).item() if expected.numel() else 1.0
    assert_close(got.double() / scale, expected / scale, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("expert_dim", [6, 32, 64, 100, 128, 200])
@pytest.mark.parametrize("d_out", [640, 700])
@torch.no_grad()
def test_outputs_larger_than_a_cache(d_out, expert_dim, dtype):
    """The kernel adds to a few columns at a time, and to some of them by a matrix unit's tiles."""
    torch.manual_seed(0)
    experts = Experts(make_ffn(30, 5 * expert_dim, d_out=d_out), 5, None, "cpu").to(dtype)
    tokens, mask = torch.randn(300, 30).to(dtype), torch.rand(300, 5) < 0.3
    mask[:, 1] = False
    mask[:, 2] = torch.arange(300) == 7  # one token alone
    got = experts(tokens, mask)
    experts.double().set_backend("reference")
    expected = experts(tokens.double(), mask)
    assert_close(got.double(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ON_CPU)
class TestContract:
    @torch.no_grad()
    def test_all_tokens_on_one_expert(self, backend):
        ffn = make_ffn(6, 12)
        mask = torch.zeros(5, 3, dtype=torch.bool)
        mask[:, 1] = True
        tokens = torch.randn(5, 6)
        got = Experts(ffn, 3, None, backend)(tokens, mask)
        torch.testing.assert_close(got, naive(ffn, torch.arange(12) // 4, tokens, mask))

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_nan_in_gives_nan_out(self, backend, dtype):
        for activation in ACTIVATIONS.values():
            tokens = torch.randn(3, 6, dtype=dtype)
            tokens[1, 2] = torch.nan
            experts = Experts(make_ffn(6, 12, activation=activation), 3, None, backend).to(dtype)
            got = experts(tokens, torch.ones(3, 3, dtype=torch.bool))
            assert got.isnan().any(dim=1).tolist() == [False, True, False]

    @torch.no_grad()
    def test_runs_under_autocast(self, backend):
        experts = Experts(make_ffn(6, 12), 3, None, backend)
        tokens, mask = torch.randn(4, 6), torch.rand(4, 3) < 0.5
        with torch.autocast("cpu", torch.bfloat16):
            got = experts(tokens, mask)
        torch.testing.assert_close(got.float(), experts(tokens, mask), rtol=0.05, atol=0.05)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_takes_tokens_masks_and_weights_that_are_not_contiguous(self, backend, dtype):
        experts = Experts(make_ffn(6, 12, gated=True), 3, None, backend).to(dtype)
        tokens, mask = torch.randn(6, 8, dtype=dtype).t()[1:], (torch.rand(3, 7) < 0.5).t()
        expected = experts(tokens.contiguous(), mask.contiguous())
        for name in ("up_weight", "gate_weight", "down_weight"):
            weight = getattr(experts, name)
            setattr(experts, name, nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1)))
        torch.testing.assert_close(experts(tokens, mask), expected)


def test_every_kernel_is_tested():
    assert set(BACKENDS.names()) - {"triton"} == set(ON_CPU)


def test_unknown_backend():
    with pytest.raises(ConfigError, match="backend='abacus': allowed are auto, cpu, grouped, reference, triton"):
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
