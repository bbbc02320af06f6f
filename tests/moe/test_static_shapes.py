"""Padding changes no shape: one graph for all batches, however much of them is padding, and for every tau."""

import pytest
import tiny
import torch
import torch._dynamo.testing

from d2dmoe_pl import quantize_, set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers


def padded(size, length, seed):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (size, length), generator=drawn)
    real = torch.randint(1, length + 1, (size, 1), generator=drawn)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < real).long()}


@pytest.mark.parametrize(
    ("rule", "in_int8"),
    [
        ("dynk_max", True),
        *(pytest.param(rule, False, marks=pytest.mark.thorough) for rule in ("dynk_max", "dynk_cumulative", "topk")),
    ],
)
@torch.no_grad()
def test_one_graph_for_a_dozen_shapes_and_taus(rule, in_int8):
    model = tiny.routed("bert", rule=rule, tau=0.5).eval()
    if in_int8:
        quantize_(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for step in range(12):
        inputs = padded(2 + step % 5, 3 + step, step)
        set_tau_(model, step / 11)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 12
    assert len([graph for graph in counter.graphs if len(graph.graph.nodes) > 20]) == 1  # the rest finds the padding


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["auto", "reference", "grouped"])
@torch.no_grad()
def test_a_function_around_the_model(backend):
    model = tiny.routed("bert", tau=0.5).eval()
    for layer in moe_layers(model).values():
        layer.experts.set_backend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **inputs: model(**inputs).logits * 2, backend="aot_eager", fullgraph=True)
    for step in range(3):
        inputs = padded(3, 5, step)
        torch.testing.assert_close(compiled(**inputs), model(**inputs).logits * 2)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama"])
@torch.no_grad()
def test_an_exported_model_takes_other_shapes_padding_and_tau(kind):
    model = tiny.routed(kind, tau=0.5).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    sizes = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=2, max=14)}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    exported = torch.export.export(model, (), padded(3, 5, 0), dynamic_shapes=shapes).module()
    for step in range(3):
        inputs = padded(2 + step, 4 + step, step)
        torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_is_left_out_of_what_observers_see():
    model, inputs = tiny.routed("bert", tau=0.5).eval(), padded(4, 9, 1)
    real, seen = int(inputs["attention_mask"].sum()), []
    assert real < inputs["attention_mask"].numel()
    for layer in moe_layers(model).values():
        layer.watch(lambda mask: seen.append(mask))
    model(**inputs)
    assert [len(mask) for mask in seen] == [real] * 2
    assert all(mask.any(dim=1).all() for mask in seen)


@pytest.mark.parametrize("backend", ["auto", "reference", "grouped", "cpu"])
@torch.no_grad()
def test_rows_of_padding_are_zeros(backend):
    model, inputs = tiny.routed("bert", tau=0.5).eval(), padded(4, 9, 1)
    outputs = []
    for layer in moe_layers(model).values():
        layer.experts.set_backend(backend)
        layer.experts.down_bias.fill_(1.0)
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    model(**inputs)
    for output in outputs:
        assert output.shape == (4, 9, 24)
        assert torch.equal(output.abs().sum(-1) > 0, inputs["attention_mask"] == 1)


@pytest.mark.thorough
def test_a_compiled_training_step_with_padding():
    model, inputs = tiny.routed("bert", tau=0.5).eval(), padded(4, 9, 1)  # eval: no dropout
    torch._dynamo.reset()
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        call(**inputs).logits.square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
