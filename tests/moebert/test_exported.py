"""MoEBERT models that torch.export and torch.jit.trace take, for batches of other shapes and padding."""

import pytest
import tiny
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about tracing

ROUTING_NAMES = ["gate_sentence", "gate_token", "hash_random"]  # hash_balance differs in its table alone
OTHERS_ARE_THOROUGH = [pytest.param(name, marks=pytest.mark.thorough) for name in ROUTING_NAMES[1:]]


def inputs(size, length, is_padded=True):
    batch = tiny.batch("bert", size)
    ids, mask = batch["input_ids"][:, :length], batch["attention_mask"][:, :length]
    return (ids, mask) if is_padded else (ids.clamp(min=5), torch.ones_like(mask))


OTHERS = [(4, 7, True), (2, 5, True), (3, 6, False)]


@pytest.mark.parametrize("routing", ROUTING_NAMES)
@torch.no_grad()
def test_a_trace_is_good_for_other_batches(routing):
    model = tiny.Logits(tiny.moebert(routing)).eval()
    traced = torch.jit.trace(model, inputs(3, 7), check_trace=False)
    for other in OTHERS:
        given = inputs(*other)
        torch.testing.assert_close(traced(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["gate_sentence", *OTHERS_ARE_THOROUGH])
@torch.no_grad()
def test_an_exported_model_is_good_for_other_batches(routing):
    model = tiny.Logits(tiny.moebert(routing)).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, inputs(3, 7), dynamic_shapes=(sizes, sizes)).module()
    for other in OTHERS:
        given = inputs(*other)
        torch.testing.assert_close(exported(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@torch.no_grad()
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, names = tiny.Logits(tiny.moebert("gate_token")).eval(), ["ids", "mask"]
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    dynamic = {"dynamic_shapes": (sizes, sizes), "input_names": names}
    torch.onnx.export(model, inputs(3, 7), tmp_path / "model.onnx", dynamo=True, verbose=False, **dynamic)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for other in OTHERS:
        given = inputs(*other)
        [got] = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
        torch.testing.assert_close(torch.from_numpy(got), model(*given), rtol=1e-4, atol=1e-5)
