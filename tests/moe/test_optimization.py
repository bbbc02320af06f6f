"""A compiled model computes what it did, at every tau and in every shape, and is saved as it was."""

import pytest
import tiny
import torch

from d2dmoe_pl import ConfigError, load_model, optimize_, quantize_, save_artifact, set_tau_


@torch.no_grad()
def test_optimised_in_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", _with_eager_backend)
    torch._dynamo.reset()
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


def test_load_model_optimised_needs_no_no_grad(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", _with_eager_backend)
    torch._dynamo.reset()
    model = tiny.routed("bert", tau=0.5).eval()
    save_artifact(model, tmp_path)
    inputs = tiny.batch("bert")
    loaded = load_model(tmp_path, dtype="bfloat16", optimize=True)
    got = tiny.logits(loaded, inputs)
    assert not got.requires_grad
    assert (got - tiny.logits(model, inputs)).norm() < 0.1 * got.norm()


def _with_eager_backend(module, **kwargs):
    """Inductor takes a minute; what it is given is what counts here."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **kwargs)
