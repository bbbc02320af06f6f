"""The divergence of two predictions: by hand, against the plain formula, and a few rows at a time."""

import math

import pytest
import torch

from d2dmoe_pl.data import symmetric_kl as module
from d2dmoe_pl.data.symmetric_kl import symmetric_kl


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def plain(first, second):
    log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (first, second))
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def test_by_hand():
    first, second = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    p, q = first.softmax(-1), second.softmax(-1)
    expected = [0.5 * (kl(p[i], q[i]) + kl(q[i], p[i])) for i in range(3)]
    torch.testing.assert_close(symmetric_kl(first, second), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert symmetric_kl(first, first).abs().max() == 0


@pytest.mark.parametrize("chunk", [1, 20, 2**18])  # logits: a row at a time, a few, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (4, 1)])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, chunk, dtype, shape):
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    pair = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2)]
    weights = torch.rand(shape[:-1])
    for wanted in (pair, pair[:1], pair[1:]):
        given = [each if any(each is one for one in wanted) else each.detach() for each in pair]
        found, expected = symmetric_kl(*given), plain(*given)
        torch.testing.assert_close(found, expected)
        of_found, of_expected = (torch.autograd.grad((each * weights).sum(), wanted) for each in (found, expected))
        torch.testing.assert_close(of_found, of_expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_gradients_can_be_asked_for_again():
    first, second = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    total = symmetric_kl(first, second).sum()
    once, again = (torch.autograd.grad(total, first, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    divergences = symmetric_kl(torch.randn(3, 5), torch.randn(3, 5))
    assert divergences.grad_fn is None
    assert not divergences.requires_grad
