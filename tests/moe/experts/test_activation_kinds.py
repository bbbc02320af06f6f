import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from d2dmoe_pl.moe.experts.activation_kinds import KNOWN, activation_kind


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
