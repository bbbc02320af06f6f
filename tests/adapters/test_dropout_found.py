"""Dropout of an FFN that was found goes with it, whatever applies it; at a rate of 1 nothing of it is random."""

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
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers

SIZES = {"vocab_size": 40, "d_model": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0}
SEQ2SEQ = {
    **{f"{stack}_{part}": 2 for stack in ("encoder", "decoder") for part in ("layers", "attention_heads")},
    **{f"{stack}_ffn_dim": 48 for stack in ("encoder", "decoder")},
    **{f"{stack}_layerdrop": 0.0 for stack in ("encoder", "decoder")},
}
MODELS = {
    "xglm": lambda p: transformers.XGLMForCausalLM(
        transformers.XGLMConfig(
            ffn_dim=48, num_layers=2, attention_heads=2, attention_dropout=0.0, activation_dropout=p, **SIZES
        )
    ),
    "biogpt": lambda p: transformers.BioGptForCausalLM(
        transformers.BioGptConfig(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layerdrop=0.0,
            activation_dropout=p,
        )
    ),
    "pegasus": lambda p: transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(activation_dropout=p, **SIZES, **SEQ2SEQ)
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_rates_of_a_config(name):
    model = MODELS[name](1.0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(5, 40, (2, 6))
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "pegasus" else {})}
    whole, dropped = model.eval()(**batch).logits, model.train()(**batch).logits
    assert not torch.allclose(whole, dropped)
    convert_to_moe_(model, ExpertsConfig(8))
    torch.testing.assert_close(model(**batch).logits, dropped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.eval()(**batch).logits, whole, rtol=1e-4, atol=1e-4)
    merge_to_dense_(model)
    torch.testing.assert_close(model.train()(**batch).logits, dropped, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_goes_on_between_the_products_costs_next_to_nothing():
    model, widths = MODELS["xglm"](0.1), []
    convert_to_moe_(model, ExpertsConfig(8))
    for layer in model.model.layers:
        layer.fc1.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    model.eval()(input_ids=torch.randint(5, 40, (2, 6)))
    assert widths == [1, 1]


def test_what_drops_nothing_costs_nothing():
    model = MODELS["xglm"](0.0)
    convert_to_moe_(model, ExpertsConfig(8))
    assert next(iter(moe_layers(model))).endswith("fc1")  # in whose place the rest of the layer is given what it makes


class Own(nn.Module):
    """An FFN in a module of its own, between a function and another."""

    def __init__(self, between=0.0, behind=0.0, module=None):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
        self.between, self.behind, self.drop = between, behind, module or nn.Identity()

    def forward(self, x):
        hidden = self.drop(self.act(self.up(x)))
        hidden = F.dropout(hidden, self.between, training=self.training)
        return F.dropout(self.down(hidden), p=self.behind, training=self.training)


class Block(nn.Module):
    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return F.dropout(x + self.ffn(x), 0.0, self.training)


def adopted(ffn):
    model = nn.Sequential(Block(ffn), nn.Linear(8, 8))
    adopt_(model, {"input": torch.randn(2, 5, 8)})
    return model


@pytest.mark.parametrize("rates", [(1.0, 0.0), (0.0, 1.0)])
@torch.no_grad()
def test_functions_in_a_module_of_its_own(rates):
    model, x = adopted(Own(*rates)), torch.randn(3, 5, 8)
    dropped = model.train()(x)
    convert_to_moe_(model, ExpertsConfig(4))
    torch.testing.assert_close(model(x), dropped)


def test_dropouts_one_after_the_other_are_one():
    model = adopted(Own(0.5, 0.25, nn.Dropout(0.2)))
    convert_to_moe_(model, ExpertsConfig(4))
    (layer,) = moe_layers(model).values()
    assert layer.experts.hidden_dropout.p == pytest.approx(0.6)
    assert layer.output_dropout.p == 0.25
    convert_to_moe_(plain := adopted(Own()), ExpertsConfig(4))
    assert isinstance(next(iter(moe_layers(plain).values())).output_dropout, nn.Identity)


class Gelu(nn.Module):
    """An activation outside of any module, and a function that drops from it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(F.dropout(F.gelu(self.up(x)), 1.0, self.training))


@torch.no_grad()
def test_a_swapped_activation_is_dropped_from_too():
    model, x = adopted(Gelu()), torch.randn(3, 5, 8)
    dropped = model.train()(x)
    swap_activation_(model, ActivationConfig("relu"))
    torch.testing.assert_close(model(x), dropped)
    assert not torch.allclose(copy.deepcopy(model).eval()(x), dropped)


class Early(Gelu):
    """What is dropped from is what the activation is given."""

    def forward(self, x):
        return self.down(F.gelu(F.dropout(self.up(x), 0.1, self.training)))


@pytest.mark.parametrize(
    ("ffn", "seen"),
    [
        (lambda: Own(module=nn.AlphaDropout(0.1)), "ffn.down is dropped from by alpha_dropout"),
        (lambda: Own(module=nn.Dropout1d(0.1)), "ffn.down is dropped from by dropout1d"),
        (Early, "ffn.down is dropped from before its activation"),
    ],
)
def test_what_drops_otherwise_is_refused(ffn, seen):
    with pytest.raises(ConfigError, match=seen):
        adopted(ffn())
