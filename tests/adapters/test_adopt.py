"""Models of no library: their FFNs are found once an example has been seen, or it is said what was seen."""

import copy
import inspect
import pickle

import pytest
import tiny
import torch
from conversions import converts_exactly
from torch import nn
from torch.nn import functional as F

from d2dmoe_pl.adapters import adopt_
from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_, set_tau_
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns


class Plain(nn.Module):
    """An activation that is no module, and a norm behind."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(self.activation(self.up(x))))

    def activation(self, x):
        return F.gelu(x)


class Written(Plain):
    """An activation that is written out."""

    def activation(self, x):
        return x * torch.sigmoid(1.702 * x)


class Squared(Plain):
    """The square of a ReLU, in place."""

    def activation(self, x):
        return x.relu_().square()


class Gated(nn.Module):
    """A gate of its own, dropout before and behind, all in a module."""

    def __init__(self, width=8):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size) for size in ((width, 32), (width, 32), (32, width)))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.down(self.drop(F.silu(self.gate(x)) * self.up(x))))


class Fused(nn.Module):
    """Gate and up in one, in whichever order, beside a residual."""

    def __init__(self, width=8, gate_last=True):
        super().__init__()
        self.both, self.down, self.gate_last = nn.Linear(width, 64), nn.Linear(32, width), gate_last

    def forward(self, x):
        first, second = self.both(x).chunk(2, dim=-1)
        hidden = first * torch.tanh(second) if self.gate_last else torch.tanh(first) * second
        return x + self.down(hidden)


class FusedFirst(Fused):
    def __init__(self):
        super().__init__(gate_last=False)


class Interleaved(Fused):
    """Gate and up in one, each with every other output."""

    def forward(self, x):
        both = self.both(x)
        return x + self.down(torch.tanh(both[..., ::2]) * both[..., 1::2])


@pytest.mark.parametrize("block", [Plain, Written, Squared, Gated, Fused, FusedFirst, Interleaved])
@torch.no_grad()
def test_own_modules(block):
    model = nn.Sequential(block(), block()).eval()
    x = torch.randn(3, 5, 8)
    adopt_(model, {"input": x})
    converted = converts_exactly(model, {"input": x})
    assert len(moe_layers(converted)) == 2
    set_tau_(converted, 0.0)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), converted(x))
    other = copy.deepcopy(converted)  # with hooks of its own
    assert torch.equal(other(x), converted(x))
    for parameter in other.parameters():
        parameter.zero_()
    assert not torch.equal(other(x), converted(x))


@pytest.mark.parametrize("block", [Plain, Gated])
@torch.no_grad()
def test_exported(block):
    model, x = nn.Sequential(block(), block()).eval(), torch.randn(3, 5, 8)
    adopt_(model, {"input": x})
    tiny.route_(model, tau=0.3)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(-x), model(-x), rtol=1e-4, atol=1e-5)


ACTIVATIONS = [
    *(nn.Softplus(), nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(), nn.Hardshrink(), nn.Sigmoid(), nn.Tanh()),
    *(kind(inplace=inplace) for kind in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU) for inplace in (0, 1)),
    *(
        kind(inplace=inplace)
        for kind in (nn.CELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid)
        for inplace in (0, 1)
    ),
    *(nn.GELU("tanh"), nn.Threshold(0.1, 0.0, inplace=True)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_elementwise_activation_of_torch(activation):
    """Also where it is done in place."""
    model = Plain()
    model.activation = copy.deepcopy(activation)
    model = nn.Sequential(model).eval()
    example = torch.randn(2, 3, 8)
    dense = copy.deepcopy(model)
    adopt_(model, {"input": example})
    convert_to_moe_(model, ExpertsConfig(num_experts=4))
    assert len(moe_layers(model)) == 1
    torch.testing.assert_close(model(example), dense(example))


@pytest.mark.parametrize("block", [Plain, Written, Gated, Fused])
def test_an_activation_outside_of_modules_can_be_watched_and_replaced(block):
    model = nn.Sequential(block(), block()).eval()
    x = torch.randn(3, 5, 8)
    adopt_(model, {"input": x})
    before = model(x)
    seen = {}
    ffns = select_ffns(model)
    with watched_activations(ffns, lambda name, pre, post: seen.update({name: (pre, post)})):
        torch.testing.assert_close(model(x), before)
    assert set(seen) == {ffn.name for ffn in ffns}
    assert {pre.shape for pre, _ in seen.values()} == {(3, 5, 32)}
    swap_activation_(model, ActivationConfig("relu"))
    assert all(ffn.is_sparse for ffn in select_ffns(model))
    swapped = model(x)
    assert not torch.allclose(swapped, before)
    convert_to_moe_(model, ExpertsConfig(8))
    torch.testing.assert_close(model(x), swapped, rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    assert all(layer.experts.up_weight.grad.abs().sum() > 0 for layer in moe_layers(model).values())


class Shared(nn.Module):
    """A module up that two FFNs share."""

    def __init__(self):
        super().__init__()
        self.up, self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x):
        return self.one(F.relu(self.up(x))) + self.two(F.relu(self.up(x)))


class Tied(nn.Module):
    """A weight that is multiplied by elsewhere as well."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(F.relu(self.up(x))) + x @ self.up.weight.t() @ self.up.weight


class Normed(nn.Module):
    """A norm before the module down."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.norm(F.relu(self.up(x))))


class Leaking(nn.Module):
    """What the activation gives is used twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        hidden = F.relu(self.up(x))
        return self.down(hidden) * hidden.mean()


class Positions(nn.Module):
    """A network of coordinates, not of what the model is given."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.register_buffer("places", torch.randn(5, 8))

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.places)))


@pytest.mark.parametrize(
    ("module", "seen"),
    [
        (Shared, "shares a linear module with another FFN|are not called equally often"),
        (Tied, "the weights of up are used without calling it, as by a fused kernel, or where they are tied"),
        (Normed, "found no FFN of two linear modules with an activation between$"),
        (Leaking, "down what comes before it is used elsewhere as well"),
        (Positions, "down is computed of no input"),
        (lambda: nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)), "1 nothing is between two linear modules"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            "linear2 is run by a fused kernel of torch's TransformerEncoderLayer",
        ),
        (lambda: nn.Conv1d(5, 5, 1), "found no FFN"),
    ],
)
def test_what_is_refused_and_why(module, seen):
    model = module().eval()
    name = next(iter(inspect.signature(model.forward).parameters))
    with pytest.raises(ConfigError, match=seen):
        adopt_(model, {name: torch.randn(3, 5, 8)})


def test_an_example_that_does_not_fit():
    model = nn.Sequential(Plain())
    with pytest.raises(ConfigError, match=r"example: x are no arguments of Sequential; it takes \{'input'\}"):
        adopt_(model, {"x": torch.randn(2, 3, 8)})
    with pytest.raises(ConfigError, match=r"example=\{\}: must hold what the model is called with"):
        adopt_(model, {})
    for given, said in ((None, "NoneType"), (torch.ones(()), r".* of shape \(\)"), (torch.ones(0, 8), r".*\(0, 8\)")):
        with pytest.raises(ConfigError, match=rf"example: input is {said}.*; must be a tensor of a batch, with"):
            adopt_(model, {"input": given})
    with pytest.raises(ConfigError, match=r"example: is torch.float32 of shape .*; must be tensors by name"):
        adopt_(model, torch.ones(2, 3, 8))
    with pytest.raises(ConfigError, match="Sequential: is no model of transformers or timm; call adopt_ first"):
        convert_to_moe_(model, ExpertsConfig(8))


class Named(Plain):
    def forward(self, x):
        return {"logits": super().forward(x)}


def test_what_gives_no_tensor_or_cannot_be_called_is_left_as_it_was():
    for model, example, error, said in [
        (Named(), torch.randn(2, 3, 8), ConfigError, r"cannot be traced: it gives dict; must give one tensor to be "),
        (Plain(), torch.randn(2, 3, 9), (ConfigError, RuntimeError), None),
    ]:
        with pytest.raises(error, match=said):
            adopt_(model.eval(), {"x": example})
        with pytest.raises(ConfigError, match="is no model of transformers or timm; call adopt_ first"):
            convert_to_moe_(model, ExpertsConfig(8))


def test_what_no_file_can_build_again(tmp_path):
    model = nn.Sequential(Plain()).eval()
    adopt_(model, {"input": torch.randn(2, 3, 8)})
    convert_to_moe_(model, ExpertsConfig(8))
    with pytest.raises(
        ConfigError, match="Sequential: is of no library that could build it again; keep its state_dict"
    ):
        save_artifact(model, tmp_path / "artifact")
    again = nn.Sequential(Plain()).eval()
    adopt_(again, {"input": torch.randn(2, 3, 8)})
    convert_to_moe_(again, ExpertsConfig(8))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(again(x), model(x))
