"""Choices that scores learn from: the forward pass is the gate's, the backward pass reaches what is near."""

import pytest
import tiny
import torch

from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import Gate, GateConfig
from d2dmoe_pl.moe.gating._straight_through import straight_through
from d2dmoe_pl.moe.layer import learned_choices


@pytest.mark.parametrize("rule", ["dynk_max", "dynk_cumulative", "topk"])
def test_numbers_are_the_mask_and_gradients_are_largest_at_the_threshold(rule):
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = Gate(GateConfig(rule, tau=0.6))(scores)
    chosen = straight_through(scores, mask, softness=0.05)
    torch.testing.assert_close(chosen, mask.float())
    chosen.sum().backward()
    assert (scores.grad > 0).any(dim=1).all()
    assert (scores.grad >= 0).all()
    least = scores.detach().masked_fill(~mask, torch.inf).argmin(dim=1)
    torch.testing.assert_close(scores.grad.argmax(dim=1), least)


def test_scores_of_zero_give_finite_gradients():
    scores = torch.zeros(2, 4, requires_grad=True)
    (1000 * straight_through(scores, torch.ones(2, 4, dtype=torch.bool), softness=0.1)).sum().backward()
    assert (scores.grad == 0).all()


def test_no_expert_decides_alone_where_all_run():
    scores = torch.randn(256, 96, generator=torch.Generator().manual_seed(0)).mul(0.5).add(1).abs().requires_grad_()
    norms = {}
    for share in (0.5, 1.0):
        mask = scores >= scores.quantile(1 - share, dim=1, keepdim=True)
        (scores.grad,) = torch.autograd.grad(straight_through(scores, mask, softness=0.1).sum(), scores)
        norms[share] = scores.grad.norm()
        assert scores.grad.flatten().square().topk(10).values.sum() < 0.05 * norms[share] ** 2
    assert norms[1.0] < 2 * norms[0.5]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_gives_the_same_and_its_routers_learn_what_experts_are_worth(kind):
    model = tiny.routed(kind).eval()
    set_tau_(model, 0.5)
    batch, layers = tiny.batch(kind), moe_layers(model)
    plain = tiny.logits(model, batch)
    with learned_choices(layers, softness=0.1):
        learned = tiny.logits(model, batch)
    torch.testing.assert_close(learned, plain)
    learned.square().mean().backward()
    for layer in layers.values():
        assert layer.softness is None
        assert sum(parameter.grad.abs().sum() for parameter in layer.router.parameters()) > 0
