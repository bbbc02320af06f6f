"""Looking at a model leaves it as it was, and what is found in it is what it computes, whatever it is given."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import adopt_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import select_ffns


class Products(nn.Module):
    """Two linear modules, and what is between them outside of any."""

    def __init__(self, up="up", down="down"):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)


class Gelu(Products):
    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class InPlace(Products):
    """An activation that is put where the product was, and is not the same applied twice."""

    def forward(self, x):
        return x + self.down(F.silu(self.up(x), inplace=True))


class TwoActivations(Products):
    """The same products twice, with another activation."""

    def forward(self, x):
        x = x + self.down(F.relu(self.up(x)))
        return x + self.down(torch.tanh(self.up(x)))


class ByLength(Products):
    def forward(self, x):
        return x + self.down(F.relu(self.up(x)) / x.shape[1] ** 0.5)


class BySize(Products):
    def forward(self, x):
        return x + self.down(F.relu(self.up(x)) / len(x))


class ByValue(Products):
    def forward(self, x):
        return x + self.down(F.relu(self.up(x)) * float(x.abs().mean()))


class Little(Products):
    """An FFN that is another than it looks, and adds next to nothing."""

    def forward(self, x):
        return x + 1e-6 * self.down(F.relu(self.up(x)) * float(x.abs().mean()))


@pytest.mark.parametrize("module", [TwoActivations, ByLength, BySize, ByValue, Little])
@torch.no_grad()
def test_what_is_true_of_one_input_alone_is_refused(module):
    model, x = module().eval(), torch.randn(2, 5, 8)
    before = model(x)
    with pytest.raises(ConfigError, match="it computes something else"):
        adopt_(model, {"x": x})
    assert torch.equal(model(x), before)


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]


def adopted(module=Gelu):
    model = nn.Sequential(module(), module()).eval()
    adopt_(model, {"input": torch.randn(2, 5, 8)})
    return model


def test_looking_and_a_refusal_leave_the_model_as_it_was():
    model = nn.Sequential(Gelu(), nn.Dropout(0.5)).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    adopt_(model, {"input": torch.randn(2, 5, 8)})
    select_ffns(model)
    with pytest.raises(ConfigError, match="num_experts=7"):
        convert_to_moe_(model, ExpertsConfig(7))
    with pytest.raises(ConfigError, match="activation='none'"):
        swap_activation_(model, ActivationConfig("none"))
    assert [module.training for module in model.modules()] == modes
    assert not hooks_of(model)
    with watched_activations(select_ffns(model), lambda *seen: None):
        assert hooks_of(model)
    assert not hooks_of(model)


@torch.no_grad()
def test_hooks_of_others_on_a_swapped_ffn_count():
    model, x = adopted(), torch.randn(3, 5, 8)
    swap_activation_(model, ActivationConfig("relu"))
    block = model[0]
    up, down = copy.deepcopy(block.up), copy.deepcopy(block.down)
    after = block.up.register_forward_hook(lambda module, args, output: output - 1)
    before = block.down.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    expected = x + plain(down, 3 * F.relu(plain(up, x) - 1))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)[0](x), expected)
    after.remove()
    before.remove()
    torch.testing.assert_close(block(x), x + plain(down, F.relu(plain(up, x))))


def plain(linear, x):
    """What a linear module gives without its hooks."""
    return F.linear(x, linear.weight, linear.bias)


class Adapted(nn.Module):
    """A linear module with something beside it, as LoRA is."""

    def __init__(self, base_layer, width):
        super().__init__()
        self.base_layer, self.beside = base_layer, nn.Linear(base_layer.in_features, width)

    def forward(self, x):
        return self.base_layer(x) + self.beside(x)


@torch.no_grad()
def test_what_takes_the_place_of_a_part_counts():
    model, x = adopted(), torch.randn(3, 5, 8)
    swap_activation_(model, ActivationConfig("relu"))
    block = model[0]
    block.up, block.down = Adapted(block.up, 32), Adapted(block.down, 8)
    hidden = F.relu(plain(block.up.base_layer, x) + block.up.beside(x))
    expected = x + plain(block.down.base_layer, hidden) + block.down.beside(hidden)
    torch.testing.assert_close(block(x), expected)
    block.up = Adapted(block.up.base_layer, 32)
    with pytest.raises(ConfigError, match=r"0.down: something stands around it or 0.up that came after"):
        block.forward(x)


@torch.no_grad()
def test_what_is_computed_in_place_can_be_watched():
    model, x = adopted(InPlace), torch.randn(3, 5, 8)
    before, seen = model(x), {}
    with watched_activations(select_ffns(model), lambda name, pre, post: seen.update({name: (pre, post)})):
        torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(seen["0.down"][0], model[0].up(x))


@pytest.mark.parametrize("name", [None, "transformer.ffns.0"])
@torch.no_grad()
def test_a_swapped_activation_outlasts_experts(name):
    config = transformers.XLMConfig(emb_dim=24, n_layers=2, n_heads=2, vocab_size=40, gelu_activation=False)
    model = transformers.XLMWithLMHeadModel(config).eval()
    ids = torch.randint(5, 40, (2, 6))
    before = model(input_ids=ids).logits
    chosen = None if name is None else lambda ffn, own: own == name
    swap_activation_(model, ActivationConfig("relu"), chosen)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    convert_to_moe_(model, ExpertsConfig(4))
    merge_to_dense_(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    handle = model.transformer.ffns[0].lin1.register_forward_hook(lambda module, args, output: output - 1)
    assert not torch.allclose(model(input_ids=ids).logits, before)
    handle.remove()
