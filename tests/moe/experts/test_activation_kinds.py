import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.experts.activation_kinds import KNOWN, activation_kind, mixes_neurons


class Stepped(nn.Module):
    """ReLU in steps of a sixteenth."""

    def forward(self, x):
        return (torch.relu(x) * 16).round() / 16


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), "tanh"),
        (ACT2FN["gelu"], "gelu"),
        (ACT2FN["gelu_new"], "gelu_tanh"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["swish"], "silu"),
        (ACT2FN["quick_gelu"], None),
        (nn.ReLU6(), None),
        (nn.LeakyReLU(), None),
        (nn.Hardtanh(0, 20), None),
        (nn.Hardtanh(0, 1000), None),
        (nn.Threshold(-15, 0), None),
        (nn.Threshold(0.1, 0.0), None),
        (nn.Threshold(0.001, 0.0), None),
        (Stepped(), None),
        (nn.PReLU(), None),
        (nn.PReLU(8, init=0.0), None),
        (nn.BatchNorm1d(4), None),
        (nn.GLU(), None),
    ],
)
def test_a_function_is_told_by_its_values(activation, kind):
    assert activation_kind(activation) == kind


def test_it_is_told_on_the_meta_device_too():
    with torch.device("meta"):
        assert activation_kind(nn.GELU()) == "gelu"


def test_every_known_function_is_told_apart():
    class Known(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    assert [activation_kind(Known(function)) for function in KNOWN.values()] == list(KNOWN)


class Largest(nn.Module):
    """All but the four largest of a token are zero."""

    def forward(self, hidden):
        return F.relu(hidden) * (hidden >= hidden.topk(4, -1).values[..., -1:])


@pytest.mark.parametrize("activation", [nn.Softmax(-1), Largest(), nn.LogSoftmax(-1), nn.GLU()])
def test_what_mixes_neurons(activation):
    assert mixes_neurons(activation, 32)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=1, vocab_size=9))
    model.transformer.h[1].mlp.act = activation
    said = rf"transformer\.h\.1\.mlp: what its {type(activation).__name__} gives for a neuron depends on others; must"
    with pytest.raises(ConfigError, match=said):
        convert_to_moe_(model, ExpertsConfig(4))
    assert type(model.transformer.h[0].mlp).__name__ == "GPT2MLP"


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.PReLU(), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.RReLU(), nn.Threshold(0.5, 0.0), nn.CELU()],
)
def test_what_does_not(activation):
    before = [module.training for module in activation.modules()]
    assert not mixes_neurons(activation, 32)
    assert not mixes_neurons(activation, 1)
    assert [module.training for module in activation.modules()] == before
