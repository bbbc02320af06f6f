"""What int8 would lose is left as it is, and said: code, parameters and hooks of its own, weights read elsewhere."""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from d2dmoe_pl import adopt_, load_model, quantize_, save_artifact, set_tau_
from d2dmoe_pl.moe.quantization.int8_layers import Int8Linear, quantized_names


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Scaled(nn.Linear):
    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.scaling = nn.Parameter(torch.rand(d_out) * 2)

    def forward(self, x):
        return super().forward(x) * self.scaling


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class InOtherWords(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def apart(one, other):
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def in_int8(model, call):
    """How far apart what a model gives is in int8, and the names of what is."""
    before = call(model)
    quantize_(model)
    return apart(call(model), before), quantized_names(model)


@pytest.mark.parametrize(
    ("kind", "is_taken", "said"),
    [
        (Cosine, False, "gives something else than the product with its weight"),
        (Scaled, False, "has a parameter scaling beside its weight"),
        (InOtherWords, True, None),
        (nn.Linear, True, None),
    ],
)
def test_classes_derived_from_a_linear_module(kind, is_taken, said, caplog):
    torch.manual_seed(0)
    model, batch = tiny.dense("bert"), tiny.batch("bert")
    model.classifier = kind(24, model.config.num_labels)
    error, names = in_int8(model, lambda model: tiny.logits(model, batch))
    assert error < 0.05
    assert ("classifier" in names) == is_taken
    told = [message for message in caplog.messages if "are not put in int8" in message]
    expected = f"BertForSequenceClassification: 1 modules are not put in int8, the first classifier, which {said}."
    assert told == ([] if said is None else [expected])


def test_one_that_gives_more_than_a_tensor():
    model, x = nn.ModuleDict({"a": Pair(8, 8), "b": nn.Linear(8, 8)}), torch.randn(2, 5, 8)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.up, self.act, self.down = model, nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

        def forward(self, x):
            x = x + self.down(self.act(self.up(x)))
            return self.parts["b"](self.parts["a"](x)[0])

    whole = Both().eval()
    adopt_(whole, {"x": x})
    error, names = in_int8(whole, lambda each: each(x))
    assert error < 0.05
    assert "parts.a" not in names
    assert "parts.b" in names


READS = {
    "transposed": lambda x, weight: x @ weight.t(),
    "as it is cast": lambda x, weight: F.linear(x, weight.to(x.dtype)),
    "distances": lambda x, weight: -torch.cdist(x, weight.expand(len(x), -1, -1)),
    "joined": lambda x, weight: x @ torch.cat([weight, weight]).t(),
    "its type alone": lambda x, weight: x.to(torch.promote_types(weight.dtype, torch.float32)),
}


class Texts(nn.Module):
    """Its head reads the embedding's weight, in one way or another."""

    def __init__(self, read):
        super().__init__()
        self.embedding, self.act = nn.Embedding(50, 16), nn.GELU()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.read = read

    def forward(self, ids):
        x = self.embedding(ids)
        return READS[self.read](x + self.down(self.act(self.up(x))), self.embedding.weight)


@pytest.mark.parametrize("read", list(READS))
def test_a_weight_that_other_code_computes_with(read, caplog):
    torch.manual_seed(0)
    model, ids = Texts(read).eval(), torch.randint(50, (2, 6))
    adopt_(model, {"ids": ids})
    error, names = in_int8(model, lambda each: each(ids))
    assert error < 0.05
    is_read = read != "its type alone"
    assert ("embedding" in names) != is_read
    assert any("which has a weight that other code computes with" in each for each in caplog.messages) == is_read


@pytest.mark.parametrize("kind", ["after", "before", "forward"])
def test_what_has_hooks_or_a_forward_of_its_own(kind):
    model, batch = tiny.dense("bert"), tiny.batch("bert")
    linear = model.bert.encoder.layer[1].attention.self.value
    if kind == "after":
        linear.register_forward_hook(lambda module, args, output: output * 3)
    elif kind == "before":
        linear.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    else:
        linear.forward = lambda x, forward=linear.forward: forward(x).flip(-1)
    error, names = in_int8(model, lambda each: tiny.logits(each, batch))
    assert error < 0.05
    assert "bert.encoder.layer.1.attention.self.value" not in names
    assert "bert.encoder.layer.1.attention.self.key" in names


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_dense_model_is_saved_by_its_library_as_what_it_is(kind, tmp_path):
    model, batch = tiny.dense(kind), tiny.batch(kind)
    quantize_(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(load_model(tmp_path / "saved"), batch), tiny.logits(model, batch))
    save_artifact(tiny.dense(kind), tmp_path / "dense")
    load_model(tmp_path / "dense", dtype="int8").save_pretrained(tmp_path / "again")
    assert quantized_names(load_model(tmp_path / "again"))


def test_weights_in_float_are_not_loaded_into_it():
    model = tiny.dense("bert")
    int8 = copy.deepcopy(model)
    quantize_(int8)
    with pytest.raises(RuntimeError, match=r"classifier\.weight: is torch\.float32, and the model is in int8; load it"):
        int8.load_state_dict(model.state_dict(), strict=False)
    again = copy.deepcopy(int8)
    assert not again.load_state_dict(int8.state_dict()).missing_keys


def test_what_is_too_wide_for_sums_of_32_bits(monkeypatch):
    monkeypatch.setattr("d2dmoe_pl.moe.quantization.quantize.WIDEST", 30)
    model = tiny.dense("bert")  # 24 wide, with FFNs of 48
    quantize_(model)
    names = quantized_names(model)
    assert "bert.encoder.layer.0.intermediate.dense" in names
    assert "bert.encoder.layer.0.output.dense" not in names


def test_modes_stay_as_they_are():
    model = tiny.dense("bert").eval()
    dropout = model.dropout.train()
    quantize_(model)
    assert dropout.training
    assert not model.bert.training


def test_derivatives_forward_are_none_of_zero():
    linear, x = nn.Linear(8, 3), torch.randn(5, 8)
    int8 = Int8Linear(linear.weight, linear.bias)
    _, found = torch.func.jvp(int8, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(linear, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_copy_made_in_inference_mode_can_be_set_outside():
    model, batch = tiny.routed("bert"), tiny.batch("bert")
    with torch.inference_mode():
        copied = copy.deepcopy(model)
    for each in (model, copied):
        set_tau_(each, 0.2)
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(copied, batch), tiny.logits(model, batch))
