"""Penalties and schedules against their definitions."""

import pytest
import torch

from d2dmoe_pl.moe.sparsity_penalties import alpha_at, clamped, hoyer, l1


def test_l1_by_hand():
    assert l1(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [3.0, 0.0]


def test_hoyer_counts_equal_activations():
    for firing in (1, 3, 8):
        activation = torch.zeros(2, 8)
        activation[:, :firing] = 0.7
        torch.testing.assert_close(hoyer(activation), torch.full((2,), float(firing)))
    assert hoyer(torch.zeros(1, 4)).tolist() == [0.0]


def test_hoyer_does_not_depend_on_scale():
    activation = torch.rand(3, 10)
    torch.testing.assert_close(hoyer(activation), hoyer(activation * 100))


def test_nothing_overflows_in_half_precision():
    activation = (torch.rand(3, 512) * 300).half().requires_grad_()
    activation.data[0] = 0  # a token for which no neuron fires
    for penalty in (l1, hoyer):
        found = penalty(activation)
        torch.testing.assert_close(found, penalty(activation.float()))
        (gradient,) = torch.autograd.grad(found.sum(), activation)
        assert gradient.dtype == torch.float16
        assert gradient.isfinite().all()


def test_clamped_pre_activation():
    assert clamped(torch.tensor([-12.0, -10.0, -7.0, 1.0]), -10.0).tolist() == [0.0, 0.0, 3.0, 11.0]


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [2, 2, 2, 2]), ("linear", [0, 0.5, 1, 2]), ("warmup", [0, 1, 2, 2])]
)
def test_schedules(schedule, expected):
    assert [alpha_at(2.0, schedule, progress) for progress in (0, 0.25, 0.5, 1)] == expected
