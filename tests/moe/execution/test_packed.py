"""Packed copies of weights are of the weights at hand, whatever lay in the same memory before."""

import pytest
import torch
from ffns import make_ffn
from torch import nn

from d2dmoe_pl.moe.execution import cpu, reference
from d2dmoe_pl.moe.experts.experts import Experts


def on(memory, shape):
    """A new bf16 parameter on ``memory``, as the last one on it."""
    weight = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    return nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["up_weight", "down_weight", "up_bias"])
def test_another_tensor_in_the_same_memory_is_another(name):
    experts = Experts(make_ffn(32, 64), 4).to(torch.bfloat16).eval().requires_grad_(False)
    tokens, mask = torch.randn(9, 32, dtype=torch.bfloat16), torch.rand(9, 4) > 0.3
    values = getattr(experts, name).clone()
    memory = bytearray(values.nbytes)
    alive = []
    for factor in (1, 3):
        alive.append(on(memory, values.shape))
        alive[-1].data.copy_(factor * values)
        setattr(experts, name, alive[-1])
        expected = reference.reference(experts, tokens, mask)
        torch.testing.assert_close(cpu.cpu(experts, tokens, mask), expected, rtol=0.05, atol=0.05)
    assert alive[0].data_ptr() == alive[1].data_ptr()
