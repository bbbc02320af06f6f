"""A compiled model computes what it did, at every tau and in every shape, and is saved as it was."""

import pytest
import tiny
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from d2dmoe_pl import (
    ConfigError,
    GateConfig,
    load_model,
    optimize_,
    quantize_,
    save_artifact,
    set_backend_,
    set_gate_,
    set_tau_,
)
from d2dmoe_pl.moe.graph_passes import use_operators_
from d2dmoe_pl.moe.quantization.int8_layers import Int8Linear


@torch.no_grad()
def test_optimised_in_int8(tmp_path, compiled):
    model = tiny.routed("bert", tau=0.5).eval()
    quantize_(model)
    save_artifact(model, tmp_path / "before")
    inputs = tiny.batch("bert")
    expected = {}
    for tau in (0.2, 1.0):
        set_tau_(model, tau)
        expected[tau] = tiny.logits(model, inputs)
    optimize_(model)
    for tau, logits in expected.items():
        set_tau_(model, tau)
        torch.testing.assert_close(tiny.logits(model, inputs), logits)
    save_artifact(model, tmp_path / "after")
    assert (tmp_path / "before" / "d2dmoe.safetensors").read_bytes() == (
        tmp_path / "after" / "d2dmoe.safetensors"
    ).read_bytes()
    with pytest.raises(ConfigError, match=r"^BertForSequenceClassification: is optimised already$"):
        optimize_(model)


def test_load_model_optimised_needs_no_no_grad(tmp_path, compiled):
    model = tiny.routed("bert", tau=0.5).eval()
    save_artifact(model, tmp_path)
    inputs = tiny.batch("bert")
    loaded = load_model(tmp_path, dtype="bfloat16", optimize=True)
    got = tiny.logits(loaded, inputs)
    assert not got.requires_grad
    assert (got - tiny.logits(model, inputs)).norm() < 0.1 * got.norm()


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "attentions"), [("bert", 2), ("timm_vit", 2), ("gpt2", 2)])
@torch.no_grad()
def test_short_attention_is_ours(family, attentions, compiled):
    model = tiny.routed(family, tau=0.5).eval()
    inputs = tiny.batch(family)
    expected = tiny.logits(model, inputs)
    optimize_(model)
    torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    (graph,) = compiled
    assert graph.count("attention_cpu") == attentions


@pytest.mark.thorough
@torch.no_grad()
def test_causal_attention_without_a_mask_is_atens(compiled):
    model = tiny.routed("gpt2", tau=0.5).eval()
    ids = tiny.batch("gpt2")["input_ids"]
    expected = model(ids).logits
    optimize_(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    (graph,) = compiled
    assert graph.count("attention_cpu") == 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "joined", "alone", "fused"),
    [
        ("bert", 0, 4, 2),  # outputs, the pooler and the head
        ("timm_vit", 0, 3, 2),  # queries, keys and values of one layer
        ("gpt2", 0, 3, 2),  # causal, by a mask
        ("modernbert", 0, 6, 0),  # queries and keys are turned
        ("t5", 1, 10, 4),  # in the decoder keys and values of what was read, too; widths that are symbols
    ],
)
@torch.no_grad()
def test_linear_layers_in_int8_that_share_an_input_round_it_once(family, joined, alone, fused, compiled):
    model = tiny.routed(family, tau=0.5).eval()
    quantize_(model)
    inputs = tiny.batch(family)
    expected = tiny.logits(model, inputs)
    optimize_(model)
    assert torch.equal(tiny.logits(model, inputs), expected)
    found = [name for graph in compiled for name in graph]
    operators = ("int8_linears_cpu", "int8_linear_cpu", "int8_self_attention_cpu")
    assert tuple(map(found.count, operators)) == (joined, alone, fused)


class SelfAttention(nn.Module):
    """Four heads of 16, of a linear layer for each of three, or one for all.

    Args:
        order: Dimensions of what a layer gives for a token, heads before width or behind.
        of_another: Whether keys are of something else.
    """

    def __init__(self, is_fused=False, order=(4, 16), of_another=False):
        super().__init__()
        torch.manual_seed(0)
        number = 1 if is_fused else 3
        self.linears = nn.ModuleList(
            [Int8Linear(torch.randn(192 // number, 32) / 6, torch.randn(192 // number)) for _ in range(number)]
        )
        self.order = order
        self.of_another = of_another

    def forward(self, x):
        inputs = (x, x + 1.0 if self.of_another else x, x)
        given = [linear(each) for linear, each in zip(self.linears, inputs, strict=False)]
        parts = given[0].chunk(3, dim=-1) if len(given) == 1 else given
        heads = [part.unflatten(-1, self.order) for part in parts]
        places = (0, 2, 1, 3) if self.order[0] == 4 else (0, 3, 1, 2)
        mixed = nn.functional.scaled_dot_product_attention(*(each.permute(places) for each in heads))
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("settings", "is_found"),
    [
        ({}, True),
        ({"is_fused": True}, True),
        ({"order": (16, 4)}, False),  # heads in one another
        ({"of_another": True}, False),
    ],
)
@torch.no_grad()
def test_self_attention_in_int8_is_one_operator(settings, is_found, compiled):
    model = SelfAttention(**settings).eval()
    x = torch.randn(3, 20, 32)
    expected = model(x)
    optimize_(model)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    short = x[:2, :9].contiguous()
    torch.testing.assert_close(model(short), SelfAttention(**settings)(short), rtol=2e-2, atol=2e-2)
    assert all(graph.count("int8_self_attention_cpu") == is_found for graph in compiled)


CHANGES = {
    "backend": lambda model: set_backend_(model, "reference"),
    "rule": lambda model: set_gate_(model, GateConfig("topk", k=2)),
    "number": lambda model: setattr(model.bert.encoder.layer[1].output.LayerNorm, "eps", 1.0),
    "setting": lambda model: setattr(model.config, "problem_type", "regression"),
    "module": lambda model: setattr(
        model.bert.encoder.layer[1], "output", tiny.Doubled(model.bert.encoder.layer[1].output)
    ),
    "type": lambda model: model.double(),
}
REST = [each for each in CHANGES if each != "rule"]  # one tells; each takes a dozen seconds


@pytest.mark.parametrize("change", ["rule", *(pytest.param(each, marks=pytest.mark.thorough) for each in REST)])
@torch.no_grad()
def test_what_is_changed_is_compiled_anew(change, compiled):
    model = tiny.routed("bert", tau=0.5).eval()
    inputs = tiny.batch("bert")
    optimize_(model)
    tiny.logits(model, inputs)
    assert len(compiled) == 1
    CHANGES[change](model)
    optimised, model._compiled_call_impl = model._compiled_call_impl, None
    expected = tiny.logits(model, inputs)
    model._compiled_call_impl = optimised
    torch.testing.assert_close(tiny.logits(model, inputs), expected)
    assert len(compiled) == (1 if change == "setting" else 2)  # which is of no account without labels


@torch.no_grad()
def test_linear_layers_that_see_the_same_numbers_in_other_rows(compiled):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.halves, self.also = (Int8Linear(torch.randn(64, width), None) for width in (64, 32, 64))

        def forward(self, x):  # (N, 64)
            return self.all(x) + self.halves(x.view(-1, 32)).view(-1, 2, 64).sum(1) + self.also(x)

    model = Model()
    x = torch.randn(6, 64)
    expected = model(x)
    optimize_(model)
    assert torch.equal(model(x), expected)
    (graph,) = compiled
    assert (graph.count("int8_linears_cpu"), graph.count("int8_linear_cpu")) == (1, 1)


@pytest.mark.thorough
@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=1)
def test_many_models_are_each_compiled(compiled):
    """They do not fill one cache, which holds eight, and the ninth would be run as it is without a word."""
    for number in range(2):
        model = tiny.routed("bert", tau=0.5).eval()
        optimize_(model)
        tiny.logits(model, tiny.batch("bert"))
        assert len(compiled) == number + 1


@torch.inference_mode()
def test_a_model_made_in_inference_mode_is_packed_once(compiled):
    model = tiny.routed("bert", tau=0.5).eval()
    optimize_(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())


@torch.no_grad()
def test_compiled_as_it_is_used():
    """By inductor and a compiler for C++, once: other tests go without these, which take half a minute."""
    model = tiny.routed("bert", tau=0.5).eval()
    quantize_(model)
    inputs, expected = tiny.batch("bert"), {}
    for tau in (0.2, 0.6):
        set_tau_(model, tau)
        expected[tau] = tiny.logits(model, inputs)
    torch._dynamo.reset()
    optimize_(model)
    for tau, logits in expected.items():
        set_tau_(model, tau)
        torch.testing.assert_close(tiny.logits(model, inputs), logits, rtol=1e-3, atol=1e-4)


@pytest.fixture
def compiled(monkeypatch):
    """The names of the operators of each graph; inductor takes a minute, and what it is given is what counts here."""
    graphs = []

    def passed(module, inputs):
        use_operators_(module.graph)
        module.recompile()
        graphs.append(
            [str(node.target).split(".")[-2:][0] for node in module.graph.nodes if node.op == "call_function"]
        )
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=passed)
    compile_by_inductor = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, dynamic, options: compile_by_inductor(
            call, dynamic=dynamic, backend=backend, options={"guard_filter_fn": options["guard_filter_fn"]}
        ),
    )
    torch._dynamo.reset()
    return graphs
