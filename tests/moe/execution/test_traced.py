"""Converted models that others trace, export, watch everywhere or keep the weights of."""

import io
import warnings

import pytest
import tiny
import torch
from torch.nn.modules.module import register_module_forward_hook

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import set_backend_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import Gate, GateConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about tracing


def inputs(size):
    batch = tiny.batch("bert", size)
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("backend", ["auto", "grouped", "reference"])
@pytest.mark.parametrize("is_padded", [True, False])
@torch.no_grad()
def test_a_trace_is_good_for_other_batches(backend, is_padded):
    model = tiny.Logits(tiny.routed("bert", tau=0.3)).eval()
    set_backend_(model.model, backend)
    ids, mask = inputs(3)
    traced = torch.jit.trace(model, (ids, mask if is_padded else torch.ones_like(mask)), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for size in (5, 3):
        given = inputs(size)
        torch.testing.assert_close(torch.jit.load(file)(*given), model(*given), rtol=1e-4, atol=1e-5)
        file.seek(0)


@pytest.mark.parametrize(
    "config",
    [GateConfig("dynk_max", 0.4), GateConfig("dynk_cumulative", 0.4), GateConfig("topk", 0.4), GateConfig("topk", k=3)],
)
def test_gates_are_traced(config):
    gate, scores = Gate(config), torch.rand(6, 8)
    traced = torch.jit.trace(gate, torch.rand(5, 8), check_trace=False)
    assert torch.equal(traced(scores), gate(scores))


@torch.no_grad()
def test_what_cannot_be_traced_is_told():
    model = tiny.routed("timm_vit")
    set_backend_(model, "cpu")
    with pytest.raises(ConfigError, match=r"^backend='cpu': no trace, and no file of ONNX, has a place for it"):
        torch.jit.trace(model, tiny.batch()["pixel_values"], check_trace=False)


@pytest.mark.parametrize("rule", ["dynk_cumulative", "topk"])
def test_gates_that_sort_are_written_for_onnx(rule):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    gate, scores = Gate(GateConfig(rule, tau=0.4)), torch.rand(6, 8).round(decimals=1)  # some are equal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(gate, (scores,), dynamo=True, verbose=False, input_names=["scores"])
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    [mask] = session.run(None, {"scores": scores.numpy()})
    assert torch.equal(torch.from_numpy(mask), gate(scores))


@torch.no_grad()
def test_hooks_on_all_modules_see_every_part():
    model, pictures, seen = tiny.routed("timm_vit"), tiny.batch()["pixel_values"], []
    expected = model(pictures)
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    try:
        torch.testing.assert_close(model(pictures), expected, rtol=1e-4, atol=1e-5)
    finally:
        handle.remove()
    assert {"Experts", "Gate", "RegressionRouter", "ReLU"} <= set(seen)


@pytest.mark.parametrize("part", ["experts", "router", "router.up", "gate", "experts.activation"])
@torch.no_grad()
def test_what_stands_for_a_forward_is_called(part):
    model, pictures, called = tiny.routed("timm_vit"), tiny.batch()["pixel_values"], []
    expected = model(pictures)
    module = next(iter(moe_layers(model).values())).get_submodule(part)
    forward = module.forward
    module.forward = lambda *args: (called.append(part), forward(*args))[1]
    torch.testing.assert_close(model(pictures), expected, rtol=1e-4, atol=1e-5)
    assert called


@pytest.mark.parametrize("part", ["experts", "router"])
@torch.no_grad()
def test_weights_without_memory_are_told(part):
    model = tiny.routed("timm_vit")
    set_gate_(model, GateConfig(tau=0.3))
    next(iter(moe_layers(model).values())).get_submodule(part).to("meta")
    with pytest.raises(ValueError, match=r"^weights are on meta: must be on cpu, where the tokens are"):
        model(tiny.batch()["pixel_values"])
