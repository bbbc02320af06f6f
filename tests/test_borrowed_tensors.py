"""A model that was called with other tensors has its own again, whatever its modules share."""

import tiny
import torch
from torch import nn

from d2dmoe_pl import ExpertsConfig, adopt_, convert_to_moe_
from d2dmoe_pl.borrowed_tensors import Borrowing, own_tensors
from d2dmoe_pl.metrics.flops import flops_outside_ffns, sample_inputs, sample_sizes


def shared():
    """A module with a name of its own and one in each of two blocks, and a tensor in two places of it."""
    norm = nn.LayerNorm(8)
    norm.bias = norm.weight
    blocks = [
        nn.ModuleDict({"norm": norm, "mlp": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))})
        for _ in range(2)
    ]
    return norm, nn.ModuleDict({"norm": norm, "blocks": nn.ModuleList(blocks)})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.parts = shared()

    def forward(self, x):
        for block in self.parts["blocks"]:
            x = x + block["mlp"](block["norm"](x))
        return self.norm(x)


def kept(model):
    return {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters(remove_duplicate=False)}


def unchanged(model, before):
    after = kept(model)
    return after.keys() == before.keys() and all(
        after[name][0] == before[name][0] and torch.equal(after[name][1], before[name][1]) for name in before
    )


def test_loans_are_given_back():
    model, x = Twice().eval(), torch.randn(3, 8)
    before, expected = kept(model), model(x)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own_tensors(model).items()}
    assert torch.equal(Borrowing(model, zeros)(x), torch.zeros(3, 8))
    assert unchanged(model, before)
    assert torch.equal(model(x), expected)


def test_looking_for_ffns_leaves_what_modules_share():
    model, x = Twice().eval(), torch.randn(2, 5, 8)
    expected = model(x)
    norm = kept(model.norm)
    adopt_(model, {"x": x})
    convert_to_moe_(model, ExpertsConfig(num_experts=4))
    assert unchanged(model.norm, norm)
    torch.testing.assert_close(model(x), expected)


def test_counting_flops_leaves_what_modules_share():
    model = tiny.dense("timm_vit")
    convert_to_moe_(model, ExpertsConfig(num_experts=4))
    model.blocks[1].norm1 = model.blocks[0].norm1
    before, batch = kept(model), tiny.batch("timm_vit")
    flops_outside_ffns(model, sample_inputs(batch, sample_sizes(batch)[0]))
    assert unchanged(model, before)
