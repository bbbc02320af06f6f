"""Kernels that have no derivatives are not taken where some are wanted, by whatever means."""

import contextlib
import copy

import tiny
import torch
from torch import nn

from d2dmoe_pl.moe.conversion import add_stand_ins_, set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig


def test_frozen_experts_under_other_derivatives():
    """Forward mode and torch.func's transforms, of which tensors require no gradients."""
    layer = next(iter(moe_layers(tiny.routed()).values())).requires_grad_(False)
    plain = copy.deepcopy(layer)
    plain.own_experts.set_backend("reference")
    x, tangent = torch.randn(2, 3, 16)
    for no_grad in (contextlib.nullcontext, torch.no_grad):
        with no_grad():
            got, expected = (torch.func.jvp(module, (x,), (tangent,)) for module in (layer, plain))
            torch.testing.assert_close(got, expected)
            assert got[1].any()
            torch.testing.assert_close(*(torch.func.jacfwd(module)(x) for module in (layer, plain)))
            torch.testing.assert_close(torch.func.vmap(layer)(x.unsqueeze(0)), plain(x).unsqueeze(0))


def test_a_stand_in_that_is_trained_alone():
    model = tiny.routed().requires_grad_(False)
    set_tau_(model, 0.2)
    add_stand_ins_(model, StandInConfig(3))
    stand_ins = [layer.stand_in for layer in moe_layers(model).values()]
    for stand_in in stand_ins:
        stand_in.requires_grad_(True)
        for parameter in stand_in.parameters():
            nn.init.normal_(parameter)
    model(tiny.batch()["pixel_values"]).square().sum().backward()
    assert all(parameter.grad.any() for stand_in in stand_ins for parameter in stand_in.parameters())
