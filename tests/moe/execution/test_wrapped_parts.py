"""Parts of a layer that something stands around, as an adapter of one's own does."""

import pytest
import tiny
import torch
from torch import nn

from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig, make_stand_in


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args)


@pytest.mark.parametrize("part", ["router.up", "router.down", "stand_in"])
@torch.no_grad()
def test_it_is_called(part):
    """Its tensors are not where they would be, and it may do more."""
    torch.manual_seed(0)
    layer = next(iter(moe_layers(tiny.routed()).values())).eval()
    layer.stand_in = make_stand_in(layer.experts, StandInConfig(2))
    layer.stand_in.up.normal_()
    expected = layer(x := torch.randn(3, 16))
    holder, _, name = part.rpartition(".")
    around = Around(layer.get_submodule(part))
    setattr(layer.get_submodule(holder), name, around)
    torch.testing.assert_close(layer(x), expected)
    assert around.calls == 1
