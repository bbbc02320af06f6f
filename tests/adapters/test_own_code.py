"""Models of known families with parts of somebody else's: what these add is refused in a line, never lost."""

import pytest
import timm
import tiny
import torch
import transformers
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.models.llama.modeling_llama import LlamaMLP

from d2dmoe_pl import ConfigError, ExpertsConfig, convert_to_moe_
from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.moe.find_layers import moe_layers


class LoRALinear(nn.Linear):
    """A linear module that adds a product of its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.a = nn.Parameter(torch.randn(4, linear.in_features))
        self.b = nn.Parameter(torch.randn(linear.out_features, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class Doubled(nn.Linear):
    """A linear module that does something else with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


class Same(nn.Linear):
    """A linear module in other words."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Flipping(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + 0.5 * x.flip(-1)


class Logging(LlamaMLP):
    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)


class Scaled(Mlp):
    def __init__(self, in_features, **kwargs):
        super().__init__(in_features, **kwargs)
        self.gamma = nn.Parameter(torch.full((in_features,), 0.3))

    def forward(self, x):
        return self.gamma * super().forward(x)


def bert(kind):
    model = tiny.dense("bert")
    for layer in model.bert.encoder.layer:
        for part in (layer.intermediate, layer.output):
            part.dense.__class__ = kind if kind is not LoRALinear else type(part.dense)
            part.dense = LoRALinear(part.dense) if kind is LoRALinear else part.dense
    return model


def llama(kind):
    model = tiny.dense("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = kind
    return model


def patched():
    model = tiny.dense("llama")
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, forward=layer.mlp.forward: forward(x) + x
    return model


def scaled():
    return timm.create_model("vit_tiny_patch16_224", mlp_layer=Scaled, **tiny.DIGITS_VIT).eval()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bert(LoRALinear), "its LoRALinear of .* is no plain linear module, and what it adds to one would be"),
        (lambda: bert(Doubled), r"has code of its own, and computes something else than an FFN of family 'bert' does"),
        (lambda: llama(Flipping), r"has code of its own, and computes something else than an FFN of family 'llama' "),
        (patched, r"has code of its own, and computes something else than an FFN of family 'llama' does \("),
        (scaled, r"has code of its own, and computes something else than an FFN of family 'timm_vit' does \("),
    ],
)
def test_what_it_adds_is_refused(make, said):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        convert_to_moe_(model, ExpertsConfig(4))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_what_a_filter_leaves_out_may_be_anything():
    model = tiny.dense("llama")
    model.model.layers[0].mlp.__class__ = Flipping
    convert_to_moe_(model, ExpertsConfig(4), lambda _, name: name == "model.layers.1.mlp")
    assert list(moe_layers(model)) == ["model.layers.1.mlp"]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "make"), [("bert", lambda: bert(Same)), ("llama", lambda: llama(Logging))])
def test_what_computes_the_same_is_converted(kind, make):
    model, batch = make(), tiny.batch(kind)
    expected = tiny.logits(model, batch)
    convert_to_moe_(model, ExpertsConfig(4, 4))
    torch.testing.assert_close(tiny.logits(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_weights_in_a_type_that_products_are_not_in():
    model = tiny.dense("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.to(torch.float8_e4m3fn), False)
    with pytest.raises(ConfigError, match=r"is quantised already, its weights are torch\.float8_e4m3fn of Linear"):
        convert_to_moe_(model, ExpertsConfig(4))


@pytest.mark.parametrize(
    "compute",
    [
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: prune.l1_unstructured(linear, "bias", 0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        parametrizations.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_call_computes(compute):
    model = tiny.dense("bert")
    compute(model.bert.encoder.layer[1].output.dense)
    with pytest.raises(ConfigError, match=r"of its \w*Linear is computed at each call, as by pruning or weight_norm"):
        convert_to_moe_(model, ExpertsConfig(4))


def test_an_activation_with_a_number_a_neuron():
    model = tiny.dense("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.PReLU(layer.mlp.up_proj.out_features)
    with pytest.raises(ConfigError, match=r"its PReLU has weight of a number a neuron; must have the same for all"):
        convert_to_moe_(model, ExpertsConfig(4))


@torch.no_grad()
def test_an_activation_that_learns_is_computed_as_it_is():
    model, batch = tiny.dense("llama"), tiny.batch("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.PReLU(init=0.0)  # as ReLU, at first
    convert_to_moe_(model, ExpertsConfig(4, 4))
    for layer in model.model.layers:
        assert layer.mlp.experts.activation_kind is None
        layer.mlp.experts.activation.weight.fill_(0.7)
    dense = tiny.dense("llama")
    assert not torch.allclose(tiny.logits(model, batch), tiny.logits(dense, batch))


def test_a_mask_that_a_model_does_not_take_tells_no_padding():
    config = transformers.FNetConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=16
    )
    model = transformers.FNetForSequenceClassification(config).eval()
    tiny._spread(model)
    tiny.route_(model)
    batch = tiny.batch("bert")
    assert adapter_for(model).padding_mask(model, "fnet.encoder.layer.0", batch) is None
    assert tiny.logits(model, batch).shape == (3, 2)
