"""Whole models in int8: what is taken, what it costs, and what it can no longer be."""

import json
import os
from pkgutil import resolve_name

import pytest
import tiny
import torch
import transformers
from torch import nn

from d2dmoe_pl import (
    ConfigError,
    ExpertsConfig,
    GateConfig,
    QuantizationConfig,
    RouterConfig,
    add_routers_,
    adopt_,
    convert_to_moe_,
    load_model,
    merge_to_dense_,
    quantize_,
    replace_projections_,
    save_artifact,
    set_gate_,
    set_tau_,
)
from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.errors import NonFiniteWeightsError
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.projections import ProjectionConfig
from d2dmoe_pl.moe.quantization.int8_experts import Int8Experts
from d2dmoe_pl.moe.quantization.int8_layers import Int8Embedding, Int8Linear, quantized_names
from d2dmoe_pl.moe.routers import ROUTERS, Router
from d2dmoe_pl.phases import RecoveryTuning

KINDS = [kind for kind in tiny.CONFIGS if "distilled" not in kind and kind in tiny.SOURCES] + ["timm_vit"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_family_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    model, inputs = tiny.routed(kind, tau=1.0).eval(), tiny.batch(kind)
    before = tiny.logits(model, inputs)
    save_artifact(model, tmp_path / "whole")
    quantize_(model)
    assert all(isinstance(layer.experts, Int8Experts) for layer in moe_layers(model).values())
    # one head of SigLIP has no part in telling classes, and what is never called is left alone
    assert not any(type(module) is nn.Linear for name, module in model.named_modules() if ".head." not in name)
    got = tiny.logits(model, inputs)
    assert (got - before).norm() < (0.3 if "t5" in kind else 0.1) * before.norm()  # nothing scales T5's attention
    save_artifact(model, tmp_path / "int8")
    for loaded in (load_model(tmp_path / "int8"), load_model(tmp_path / "whole", dtype="int8")):
        assert torch.equal(tiny.logits(loaded, inputs), got)
        assert quantized_names(loaded) == quantized_names(model)
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    set_tau_(model, 0.3)
    assert not torch.equal(tiny.logits(model, inputs), got)


def test_files_are_a_quarter(tmp_path):
    config = tiny.bert_config(hidden_size=128, intermediate_size=512, vocab_size=3000)
    model = type(tiny.dense("bert"))(config).eval()
    convert_to_moe_(model, ExpertsConfig(8))
    add_routers_(model, RouterConfig(16))
    save_artifact(model, tmp_path / "whole")
    quantize_(model)
    save_artifact(model, tmp_path / "int8")
    sizes = [os.path.getsize(tmp_path / name / "d2dmoe.safetensors") for name in ("int8", "whole")]
    assert sizes[0] < 0.3 * sizes[1]
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["d2dmoe"]["format"] == 3


@torch.no_grad()
def test_tied_weights_stay_tied(tmp_path):
    model = tiny.routed("gpt2-causal-language-modeling").eval()
    quantize_(model)
    save_artifact(model, tmp_path)
    for each in (model, load_model(tmp_path)):
        assert each.lm_head.weight is each.transformer.wte.weight
        assert each.lm_head.scale is each.transformer.wte.scale


@torch.no_grad()
def test_what_is_shared_with_what_is_called_is_in_int8_as_well(tmp_path):
    config = transformers.T5Config(vocab_size=900, d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=8)
    model = transformers.T5ForConditionalGeneration(config).eval()
    quantize_(model)  # encoder and decoder call embeddings of their own, which have the weight of a third
    save_artifact(model, tmp_path)
    for each in (model, load_model(tmp_path)):
        assert each.shared.weight.dtype == torch.int8
        assert each.shared.weight is each.encoder.embed_tokens.weight is each.decoder.embed_tokens.weight
    assert os.path.getsize(tmp_path / "d2dmoe.safetensors") < 2 * 900 * 16  # a byte a number, and scales


@pytest.mark.parametrize("kind", ["gemma-causal-language-modeling", "bart"])
@torch.no_grad()
def test_embeddings_that_are_multiplied(kind, tmp_path):
    model = tiny.routed(kind).eval()
    if kind == "bart":
        model.config.scale_embedding = True
        model = type(model)(model.config).eval()
    ids = torch.arange(9).view(3, 3)
    expected = model.get_input_embeddings()(ids)
    assert expected.abs().mean() > 3 * model.get_input_embeddings().weight[:9].abs().mean()
    quantize_(model)
    save_artifact(model, tmp_path)
    for each in (model, load_model(tmp_path)):
        embeddings = each.get_input_embeddings()
        assert isinstance(embeddings, Int8Embedding)
        torch.testing.assert_close(embeddings(ids), expected, rtol=0, atol=expected.abs().max() / 127)
        if each.config.tie_word_embeddings and each.get_output_embeddings() is not None:
            assert each.get_output_embeddings().scale is embeddings.scale


def test_an_embedding_with_a_row_of_its_own_for_a_token_is_left_alone():
    embedding = resolve_name("transformers.models.t5gemma2.modeling_t5gemma2:T5Gemma2TextScaledWordEmbedding")
    adapter = adapter_for(tiny.dense("gemma"))
    assert adapter.embedding_scale(embedding(9, 16, 0, embed_scale=4.0, eoi_token_index=3)) is None


class Larger(nn.Module):
    def forward(self, weight):
        return weight * 1.3


@pytest.mark.parametrize("kind", ["bert", "llama"])
@torch.no_grad()
def test_weights_that_are_computed_are_each_their_own(kind):
    model, inputs = tiny.dense(kind), tiny.batch(kind)
    for module in [module for module in model.modules() if type(module) is nn.Linear]:
        nn.utils.parametrize.register_parametrization(module, "weight", Larger())
    before = tiny.logits(model, inputs)
    quantize_(model)
    assert (tiny.logits(model, inputs) - before).norm() < 0.1 * before.norm()


@torch.no_grad()
def test_experts_in_two_places_stay_the_same():
    model, inputs = tiny.routed("timm_vit", tau=1.0), tiny.batch("timm_vit")
    model.blocks[1].mlp = model.blocks[0].mlp
    before = tiny.logits(model, inputs)
    quantize_(model)
    assert model.blocks[1].mlp.experts is model.blocks[0].mlp.experts
    assert (tiny.logits(model, inputs) - before).norm() < 0.1 * before.norm()


@torch.no_grad()
def test_a_filter_and_a_dense_model(tmp_path):
    model, inputs = tiny.dense("bert").eval(), tiny.batch("bert")
    before = tiny.logits(model, inputs)
    quantize_(model, QuantizationConfig(embeddings=False), lambda module, name: ".attention." in name)
    assert all(".attention." in name for name in quantized_names(model))
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, Int8Linear)
    assert (tiny.logits(model, inputs) - before).norm() < 0.1 * before.norm()
    save_artifact(model, tmp_path)
    assert quantized_names(load_model(tmp_path)) == quantized_names(model)


@torch.no_grad()
def test_a_router_in_part(tmp_path):
    model = tiny.routed("bert", tau=0.5).eval()
    quantize_(model, None, lambda module, name: name.endswith("router.up"))
    layer = next(iter(moe_layers(model).values()))
    assert layer.router.is_quantized is None
    tiny.logits(model, tiny.batch("bert"))


class OwnRouter(Router):
    """Calls a linear layer, and reads the weights of another."""

    def __init__(self, experts, config):
        super().__init__(experts, config)
        self.inner = nn.Linear(experts.d_model, experts.d_model)
        self.prototypes = nn.Linear(experts.d_model, experts.num_experts, bias=False)

    def forward(self, tokens):
        return self.inner(tokens) @ nn.functional.normalize(self.prototypes.weight).T + 9

    def flops(self):
        return 2 * (self.inner.weight.numel() + self.prototypes.weight.numel())


@torch.no_grad()
def test_what_a_router_of_ones_own_only_reads_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(ROUTERS, "_registered", {"own": OwnRouter})
    model, pixels = tiny.routed("timm_vit"), tiny.batch("timm_vit")["pixel_values"]
    set_gate_(model, None)
    add_routers_(model, RouterConfig(kind="own"))
    set_gate_(model, GateConfig("topk", k=3))
    expected = model(pixels)
    quantize_(model)
    (router, *_) = (layer.get_router() for layer in moe_layers(model).values())
    assert isinstance(router.inner, Int8Linear)
    assert router.prototypes.weight.dtype == torch.float32
    torch.testing.assert_close(model(pixels), expected, rtol=0.1, atol=0.1)
    save_artifact(model, tmp_path / "artifact")
    torch.testing.assert_close(load_model(tmp_path / "artifact")(pixels), model(pixels))


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"^dtype='int4': allowed are int8$"):
        QuantizationConfig("int4")
    model = tiny.routed("bert").eval()
    with pytest.raises(ConfigError, match=r"no experts, linear layers or embeddings found that the filter admits$"):
        quantize_(model, None, lambda module, name: False)
    with pytest.raises(ConfigError, match=r"has experts that quantize_ cannot take; must be what convert_to"):
        quantize_(tiny.moebert())
    broken = tiny.routed("bert")
    broken.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteWeightsError, match=r"classifier\.weight"):
        quantize_(broken)
    assert not quantized_names(broken)
    quantize_(model)
    said = "BertForSequenceClassification: is in int8; must be converted, trained and merged before quantize_"
    for change in (
        quantize_,
        merge_to_dense_,
        lambda model: convert_to_moe_(model, ExpertsConfig(4)),
        lambda model: add_routers_(model, RouterConfig(4)),
        lambda model: replace_projections_(model, ProjectionConfig()),
    ):
        with pytest.raises(ConfigError, match=f"^{said}$"):
            change(model)
    save_artifact(model, tmp_path)
    with pytest.raises(ConfigError, match=r"is in int8, which no phase can go on from; must be the artifact"):
        RecoveryTuning(init_from=tmp_path).read_start()
    assert RecoveryTuning(init_from=tmp_path).read_start(is_to_fit=False).quantized
    with pytest.raises(ConfigError, match=r"^dtype='int2': allowed are float32, bfloat16, float16, int8$"):
        load_model(tmp_path, dtype="int2")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float32"])
def test_load_model_in_a_type(dtype, tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert {str(parameter.dtype).removeprefix("torch.") for parameter in loaded.parameters()} == {
        str(dtype).removeprefix("torch.")
    }


@torch.inference_mode()
def test_a_model_made_in_inference_mode_is_packed_once():
    torch.manual_seed(0)
    model, inputs = tiny.routed("bert", tau=0.5).eval(), tiny.batch("bert")
    quantize_(model)
    before = tiny.logits(model, inputs)
    for layer in moe_layers(model).values():
        assert not any(tensor.is_inference() for tensor in layer.buffers())
    assert not model.classifier.weight.is_inference()
    assert torch.equal(tiny.logits(model, inputs), before)


class _AroundTorchsLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 16, max_norm=0.5)
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, ids):
        x = self.encoder(self.embedding(ids))
        return x + self.down(torch.relu(self.up(x)))


@torch.no_grad()
def test_what_torch_computes_by_other_means_is_left_alone():
    model, ids = _AroundTorchsLayers().eval(), torch.arange(9)[None].repeat(2, 1)
    adopt_(model, {"ids": ids})
    convert_to_moe_(model, ExpertsConfig(4))
    before = model(ids)
    quantize_(model)
    assert quantized_names(model) == ["down.experts"]
    assert (model(ids) - before).norm() < 0.1 * before.norm()
