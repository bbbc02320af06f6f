"""What ``auto`` takes on a GPU, shown on tensors that say that they are on one, and hold nothing."""

import contextlib

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2dmoe_pl.moe.execution import auto
from d2dmoe_pl.moe.find_layers import moe_layers

KINDS = ["bert", "timm_vit", "gpt2", "llama"]
on_triton = pytest.importorskip("d2dmoe_pl.moe.execution.triton", reason="needs Triton", exc_type=ImportError)


@pytest.fixture(autouse=True)
def _nothing_can_be_timed(monkeypatch):
    monkeypatch.setattr(on_triton, "fastest", lambda *_: "listed")


@contextlib.contextmanager
def on_a_gpu(kind):
    """A converted model, and a batch for it."""
    model, batch = tiny.routed(kind).requires_grad_(False), tiny.batch(kind)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield model.to("cuda"), {name: tensor.to("cuda") for name, tensor in batch.items() if name != "labels"}


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def run(model, batch):
    """Not by the adapter, which looks at where padding is."""
    return model(batch["pixel_values"]) if "pixel_values" in batch else model(**batch)


def calls(names):
    return sum("d2dmoe_pl" in name and "moe_triton" in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_runs_by_triton(kind):
    with on_a_gpu(kind) as (model, batch), Called() as called:
        run(model, batch)
    assert calls(called.names) == len(moe_layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_compiles_whole(kind):
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with on_a_gpu(kind) as (model, batch):
        model.compile(fullgraph=True, dynamic=True, backend=keep)
        run(model, batch)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert calls(called) == len(moe_layers(model))


def test_without_triton_experts_run_one_after_the_other(monkeypatch):
    monkeypatch.setattr(auto, "_can_import_triton", lambda: False)
    auto._warn.cache_clear()
    with on_a_gpu("bert") as (model, _):
        layer = next(iter(moe_layers(model).values()))
        with pytest.warns(UserWarning, match="^backend='auto': Triton is not installed, and experts run by 'grouped'"):
            backend = auto.choose(layer.experts, torch.zeros(3, 24, device="cuda"))
    assert backend.__name__ == "grouped"
