"""What adopt_ proves holds for weights that are loaded later, and what it finds can be replaced as it stands."""

import copy

import pytest
import torch
from torch import nn

from d2dmoe_pl import ConfigError, ExpertsConfig, adopt_, convert_to_moe_
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns


class Texts(nn.Module):
    """Reads all positions at its end, so that padding counts whatever the mask says; down begins at zero."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)
        self.head = nn.Linear(16, 3)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, ids, attention_mask=None):
        x = self.embedding(ids)
        return self.head((x + self.down(self.act(self.up(self.norm(x))))).mean(1))


def trained():
    torch.manual_seed(0)
    model = Texts().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def padded():
    ids = torch.randint(50, (2, 6))
    return ids, torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


@torch.no_grad()
@pytest.mark.parametrize("when", ["before it is loaded", "without weights"])
def test_a_mask_is_tried_with_weights_that_show_something(when):
    dense, (ids, mask) = trained(), padded()
    if when == "without weights":
        with torch.device("meta"):
            model = Texts().eval()
        adopt_(model, {"ids": torch.randint(50, (2, 6), device="meta")})
        model.to_empty(device="cpu")
    else:
        model = Texts().eval()
        adopt_(model, {"ids": ids})
        assert (model.down.weight == 0).all()
        assert (model.down.bias == 0).all()
    model.load_state_dict(dense.state_dict())
    if when == "without weights":
        adopt_(model, {"ids": ids})
    convert_to_moe_(model, ExpertsConfig(4))
    torch.testing.assert_close(model(ids, mask), dense(ids, mask), rtol=1e-4, atol=1e-5)


class Divided(nn.Module):
    """Its hidden layer is divided by the number of positions, which no FFN does; nothing shows while down is zero."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)) / x.shape[1] ** 0.5)


def test_what_shows_nothing_yet_proves_nothing():
    with pytest.raises(ConfigError, match="it computes something else"):
        adopt_(nn.Sequential(Divided(), Divided()).eval(), {"input": torch.randn(2, 5, 16)})


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.other, self.dropout = nn.LayerNorm(16), nn.Linear(16, 16), nn.Dropout(0.3)
        self.up, self.act, self.down = nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)


class Casts(Parts):
    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x).to(self.up.weight.dtype))))


class Reshapes(Parts):
    def forward(self, x):
        hidden = self.up(self.norm(x)).view(-1, 64)
        return x + self.down(self.act(hidden).view(*x.shape[:-1], 64))


class Asserts(Parts):
    def forward(self, x):
        hidden = self.act(self.up(self.norm(x)))
        assert hidden.shape[-1] == 64
        return x + self.down(hidden)


class Shares(Parts):
    """One dropout for all that is dropped."""

    def forward(self, x):
        x = x + self.dropout(self.other(self.norm(x)))
        return x + self.dropout(self.down(self.dropout(self.act(self.up(self.norm(x))))))


class Looks(Parts):
    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x)))) * self.up.in_features


@torch.no_grad()
@pytest.mark.parametrize("kind", [Casts, Reshapes, Asserts, Shares])
def test_code_around_an_ffn_goes_on(kind):
    model, x = nn.Sequential(kind(), kind()).eval(), torch.randn(2, 5, 16)
    dense = copy.deepcopy(model)
    adopt_(model, {"input": x})
    convert_to_moe_(model, ExpertsConfig(4))
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(model(x[:1, :3]), dense(x[:1, :3]))


@torch.no_grad()
def test_a_dropout_of_other_parts_goes_on_dropping():
    torch.manual_seed(0)
    model, x = nn.Sequential(Shares(), Shares()), torch.randn(4, 5, 16)
    dense = copy.deepcopy(model)
    adopt_(model, {"input": x})
    convert_to_moe_(model, ExpertsConfig(4))
    spread = [torch.stack([each.train()(x) for _ in range(400)]).std(dim=0).mean() for each in (dense, model)]
    torch.testing.assert_close(spread[1], spread[0], rtol=0.05, atol=0)


def test_code_that_looks_into_parts_is_refused_and_the_model_is_as_it_was():
    model, x = nn.Sequential(Looks(), Looks()).eval(), torch.randn(2, 5, 16)
    before, names = model(x), [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=r"cannot be replaced: its code looks into their parts \(.*in_features"):
        adopt_(model, {"input": x})
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(x), before)


class Either(nn.Module):
    """Has an FFN for each of two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, a=None, b=None):
        return self.first(a) if b is None else self.second(b)


def test_another_example_is_looked_at_anew():
    model = Either().eval()
    adopt_(model, {"a": torch.randn(2, 5, 16)})
    assert [ffn.name for ffn in select_ffns(model)] == ["first"]
    adopt_(model, {"b": torch.randn(2, 5, 16)})
    assert [ffn.name for ffn in select_ffns(model)] == ["second"]


def test_an_activation_that_changes_what_it_is_given_is_watched_as_any_other():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.SiLU(inplace=True), nn.Linear(32, 16)).eval(), torch.randn(2, 5, 16)
    model = nn.Sequential(model)
    adopt_(model, {"input": x})
    seen = []
    with torch.no_grad(), watched_activations(select_ffns(model), lambda _, pre, post: seen.append((pre, post))):
        model(x)
    ((pre, post),) = seen
    torch.testing.assert_close(pre, model[0][0](x))
    torch.testing.assert_close(post, nn.functional.silu(pre))
