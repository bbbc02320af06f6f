"""Models of libraries that no adapter was written for: their FFNs are found and proved, or it is said what was seen."""

import copy
import logging

import pytest
import timm
import tiny
import torch
import transformers
from conversions import converts_exactly
from torch.utils._python_dispatch import _get_current_dispatch_mode

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.adapters._timm_model import create_timm_model
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns

TEXT = {"vocab_size": 40, **tiny.SHAPE}
DECODER = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **TEXT}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 24,
    **{f"{stack}_{part}": 2 for stack in ("encoder", "decoder") for part in ("layers", "attention_heads")},
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
HEADS = {"num_key_value_heads": 1, "head_dim": 12}
VISION = {"image_size": 32, "patch_size": 8, **tiny.SHAPE}
# of each, its FFNs: a layer that is run twice has one, one that pools between sees other positions than the text's
TRANSFORMERS = {
    "albert": (lambda: transformers.AlbertConfig(embedding_size=12, **TEXT), 1),
    "bigbird": (lambda: transformers.BigBirdConfig(**TEXT), 2),
    "bloom": (lambda: transformers.BloomConfig(hidden_size=24, n_layer=2, n_head=2, vocab_size=40, pad_token_id=0), 2),
    "canine": (lambda: transformers.CanineConfig(**tiny.SHAPE), 2),  # takes code points, and has no vocabulary
    "deberta": (lambda: transformers.DebertaConfig(**TEXT), 2),
    "falcon": (lambda: transformers.FalconConfig(**DECODER), 2),
    "fnet": (lambda: transformers.FNetConfig(**TEXT), 2),
    "gptj": (lambda: transformers.GPTJConfig(n_embd=24, n_layer=2, n_head=2, rotary_dim=4, **_ids()), 2),
    "gemma3": (lambda: transformers.Gemma3Config(text_config={**DECODER, **HEADS}, vision_config=VISION), 2),
    "longformer": (lambda: transformers.LongformerConfig(attention_window=4, **{**TEXT, "pad_token_id": 1}), 2),
    "mobilebert": (lambda: transformers.MobileBertConfig(**TEXT), 8),
    "starcoder2": (lambda: transformers.Starcoder2Config(num_key_value_heads=1, **DECODER), 2),
    "xlm": (lambda: transformers.XLMConfig(emb_dim=24, n_layers=2, n_heads=2, vocab_size=40), 2),
}
PICTURES = {
    "swin": lambda: transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "metaclip_2": lambda: transformers.MetaClip2Config(text_config=DECODER, vision_config=VISION),
    "convnext": lambda: transformers.ConvNextConfig(image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[16] * 4),
}
TIMM = {
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2,) * 4},
    "cait_xxs24_224": {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
}


def _ids():
    return {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def classifier(config, auto=transformers.AutoModelForSequenceClassification):
    model = auto.from_config(config).eval()
    tiny._spread(model)
    return model


@pytest.mark.parametrize("name", list(TRANSFORMERS))
@torch.no_grad()
def test_texts(name, tmp_path):
    make, number = TRANSFORMERS[name]
    model = classifier(make())
    inputs = adapter_for(model).random_inputs(model, 3, 7)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 4:] = mask[2, 2:] = 0
    assert len(select_ffns(model)) == number
    converts_exactly(model, {**inputs, "attention_mask": mask}, tmp_path / "artifact")


def test_how_a_model_computes_is_not_changed_by_looking_at_it():
    sparse = transformers.BigBirdConfig(attention_type="block_sparse", block_size=4, num_random_blocks=1, **TEXT)
    model = classifier(sparse)
    attention = type(model.bert.encoder.layer[0].attention.self)
    select_ffns(model)  # by calls with a few tokens, for which it has another way
    assert model.bert.attention_type == "block_sparse"
    assert type(model.bert.encoder.layer[0].attention.self) is attention


@pytest.mark.parametrize("kind", ["any_timm", "any_encoder_decoder-mt5", "any_audio"])
def test_inference_mode_hides_nothing(kind):
    """There, dropout is an operator of its own even where it does nothing, and no linear module is taken apart."""
    with torch.inference_mode():
        model, batch = tiny.SOURCES[kind]().build(tiny.labels_of(kind)).eval(), tiny.batch(kind)
        expected = tiny.logits(model, batch)
        convert_to_moe_(model, ExpertsConfig(8))
        torch.testing.assert_close(tiny.logits(model, batch), expected)
    assert moe_layers(model)


@pytest.mark.parametrize("is_called", [False, True])
def test_what_is_found_does_not_depend_on_calls_before(is_called):
    config = transformers.RwkvConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, context_length=16)
    model = classifier(config, transformers.AutoModelForCausalLM)
    ids = torch.ones(1, 4, dtype=torch.long)
    if is_called:
        model(ids)  # it divides weights once, in place
    with pytest.raises(ConfigError, match=r"feed_forward\.value are used without calling it"):
        select_ffns(model)
    expected = copy.deepcopy(model)(ids).logits
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", list(PICTURES))
@torch.no_grad()
def test_pictures(name, tmp_path):
    model = classifier(PICTURES[name](), transformers.AutoModelForImageClassification)
    converts_exactly(model, adapter_for(model).random_inputs(model, 2, 0), tmp_path / "artifact")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_pictures_in_half_precision(dtype):
    hugging_face = classifier(PICTURES["swin"](), transformers.AutoModelForImageClassification)
    of_timm = create_timm_model("cait_xxs24_224", 3, TIMM["cait_xxs24_224"], ["a", "b", "c"]).eval()
    for model in (hugging_face.to(dtype), of_timm.to(dtype)):
        inputs = adapter_for(model).random_inputs(model, 2, 0)
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
        dense = adapter_for(model).logits(model, inputs)
        convert_to_moe_(model, ExpertsConfig(4))
        torch.testing.assert_close(adapter_for(model).logits(model, inputs), dense, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("make", [transformers.PegasusConfig, transformers.MBartConfig, transformers.MarianConfig])
@torch.no_grad()
def test_answers(make, tmp_path):
    more = {"decoder_vocab_size": 40} if make is transformers.MarianConfig else {}
    model = classifier(make(**SEQ2SEQ, **more), transformers.AutoModelForSeq2SeqLM)
    inputs = tiny.batch("bart-text-to-text")
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_attention_mask"])  # rows of padding are zeros
    converted = converts_exactly(model, inputs, tmp_path / "artifact")
    assert len(moe_layers(converted)) == 4
    assert len({layer.context for layer in moe_layers(converted).values()}) == 2


@torch.no_grad()
def test_two_models_in_one(tmp_path):
    parts = [transformers.BertConfig(**{**TEXT, "vocab_size": size}) for size in (50, 40)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = transformers.EncoderDecoderModel(config).eval()
    tiny._spread(model)
    adapter = adapter_for(model)
    assert (adapter.vocabulary_size(model), adapter.num_outputs(model)) == (50, 40)
    inputs = adapter.random_inputs(model, 3, 7)
    converts_exactly(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, tmp_path / "artifact")
    pictures = transformers.ViTConfig(image_size=32, **tiny.SHAPE)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(pictures, parts[1])
    with pytest.raises(ConfigError, match=r"it takes pixel_values; what is taken of others are texts$"):
        select_ffns(transformers.VisionEncoderDecoderModel(config))


@pytest.mark.parametrize("name", list(TIMM))
@torch.no_grad()
def test_timm_as_timm_makes_it(name):
    model = timm.create_model(name, **TIMM[name]).eval()
    inputs = adapter_for(model).random_inputs(model, 2, 0)
    expected = model(inputs["pixel_values"])
    convert_to_moe_(model, ExpertsConfig(num_experts=4))
    torch.testing.assert_close(model(inputs["pixel_values"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(TIMM))
@torch.no_grad()
def test_timm(name, tmp_path):
    model = create_timm_model(name, 3, TIMM[name], ["a", "b", "c"]).eval()
    tiny._spread(model)
    converts_exactly(model, adapter_for(model).random_inputs(model, 2, 0), tmp_path / "artifact")
    swap_activation_(model, ActivationConfig("relu"))
    save_artifact(model, tmp_path / "relu")
    inputs = adapter_for(model).random_inputs(model, 2, 0)
    loaded = load_model(tmp_path / "relu")
    assert torch.equal(adapter_for(model).logits(loaded, inputs), adapter_for(model).logits(model, inputs))


@torch.no_grad()
def test_an_attention_that_cannot_be_traced():
    def attention(*args, **kwargs):  # as flex_attention does
        assert _get_current_dispatch_mode() is None, "no rule registered"
        return transformers.AttentionInterface()["sdpa"](*args, **kwargs)

    transformers.AttentionInterface.register("untraceable", attention)
    transformers.AttentionMaskInterface.register("untraceable", transformers.masking_utils.sdpa_mask)
    model = classifier(TRANSFORMERS["starcoder2"][0]())
    model.set_attn_implementation("untraceable")
    inputs = adapter_for(model).random_inputs(model, 3, 7)
    converted = converts_exactly(model, inputs)
    assert model.config._attn_implementation == converted.config._attn_implementation == "untraceable"


@torch.no_grad()
def test_a_known_class_of_timm_with_other_ffns():
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", mlp_layer=timm.models.vitamin.GeGluMlp, **sizes).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    convert_to_moe_(model, ExpertsConfig(4))
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert adapter_for(model).family == "any_timm"


@torch.no_grad()
def test_a_hybrid_takes_pictures_of_as_many_channels_as_its_stem(tmp_path):
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "in_chans": 1}
    model = create_timm_model("vit_tiny_r_s16_p8_224", 3, sizes, ["a", "b", "c"]).eval()
    assert adapter_for(model).input_shape(model) == (1, 32, 32)
    converts_exactly(model, adapter_for(model).random_inputs(model, 2, 0), tmp_path / "artifact")


def test_it_is_said_once(caplog):
    model = classifier(TRANSFORMERS["deberta"][0]())
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        select_ffns(model)
        convert_to_moe_(model, ExpertsConfig(8))
    # transformers has something to say too, where noise has padding's id in it
    assert [record.message for record in caplog.records if record.name.startswith("d2dmoe_pl")] == [
        "DebertaForSequenceClassification: no adapter knows it; 2 FFNs found by tracing and proved on random input, "
        "the first deberta.encoder.layer.0.intermediate.dense (left alone: classifier gives another width than it "
        "takes)."
    ]


def test_tokens_that_are_laid_out_otherwise():
    config = transformers.XLNetConfig(d_model=24, n_layer=2, n_head=2, d_inner=48, vocab_size=40)
    with pytest.raises(
        ConfigError, match=r"sees positions \(6, 2\), none of \[\(2, 6\)\], so that padding is not known"
    ):
        select_ffns(classifier(config))
