"""Models of narrow and wide types are saved, loaded and converted in them."""

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_


@pytest.mark.parametrize("kind", ["bert", "llama-causal-language-modeling"])
def test_bfloat16_is_kept(kind, tmp_path):
    source = tiny.SOURCES[kind]()
    model = HuggingFaceModel(source.task, config=source.config, dtype="bfloat16").build(tiny.labels_of(kind)).eval()
    tiny.route_(model)
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
    loaded = load_model(tmp_path / "artifact")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    inputs = tiny.batch(kind)
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["timm_eva", "timm_eva-rope", "timm_eva-dinov3", "any_timm"])
@torch.no_grad()
def test_what_timm_computes_beside_the_weights_is_of_their_type(kind, dtype, tmp_path):
    model, inputs = tiny.routed(kind, tau=0.3).to(dtype), {"pixel_values": tiny.batch(kind)["pixel_values"].to(dtype)}
    save_artifact(model, tmp_path / "artifact")
    assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), inputs), tiny.logits(model, inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["bert", "phi3-causal-language-modeling", "t5-text-to-text", "opt", "any_transformer"])
def test_narrow_weights_in_many_files(kind, dtype, tmp_path):
    """As large models come: they are loaded in full precision, and converted."""
    original = tiny.dense(kind, activation=None).to(getattr(torch, dtype))
    original.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = HuggingFaceModel(tiny.TASKS[kind], name=str(tmp_path), label_names=None)
    model = source.build(tiny.labels_of(kind)).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    weights = original.state_dict()
    for name, value in model.state_dict().items():
        assert name not in weights or torch.equal(value, weights[name].to(value.dtype)), name
    inputs = tiny.batch(kind)
    with torch.no_grad():
        expected = tiny.logits_of_tokens(model, inputs)
        convert_to_moe_(model, ExpertsConfig(8))
        torch.testing.assert_close(tiny.logits_of_tokens(model, inputs), expected, rtol=1e-4, atol=1e-4)
