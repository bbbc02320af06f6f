"""Another activation in all FFNs or in some, which an artifact says in either case."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig, own_activations, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns

KINDS = [
    "bert", "distilbert", "gpt2", "llama", "opt", "t5-text-to-text", "bert-masked-language-modeling",
    "timm_vit", "timm_vit-gated", "any_timm", "any_transformer",
]  # fmt: skip


def other(kind):
    return ActivationConfig("silu" if tiny.family_of(kind) in tiny.BORN_SPARSE else "relu")


def swap_first_(model, config):
    """Swap the activation of the first FFN alone; its name."""
    first = select_ffns(model)[0].name
    swap_activation_(model, config, lambda ffn, name: name == first)
    return first


@pytest.mark.parametrize("kind", KINDS)
class TestOfSome:
    def test_saved_and_loaded_gives_the_same_bits(self, kind, tmp_path):
        model, inputs = tiny.dense(kind, activation=None), tiny.batch(kind)
        before = tiny.logits(model, inputs)
        first = swap_first_(model, other(kind))
        sparse = [ffn.is_sparse for ffn in select_ffns(model)]
        assert sparse.count(sparse[0]) == 1
        expected = tiny.logits(model, inputs)
        assert not torch.equal(expected, before)
        for folder in (tmp_path / "once", tmp_path / "twice"):
            save_artifact(model, folder)
            model = load_model(folder)
            assert own_activations(model) == {first: other(kind).name}
            assert torch.equal(tiny.logits(model, inputs), expected)

    def test_with_experts_and_back_from_them(self, kind, tmp_path):
        model, inputs = tiny.dense(kind, activation=None), tiny.batch(kind)
        swap_first_(model, other(kind))
        expected = tiny.logits(model, inputs)
        convert_to_moe_(model, ExpertsConfig(8))
        save_artifact(model, tmp_path / "experts")
        loaded = load_model(tmp_path / "experts")
        assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
        merge_to_dense_(loaded)
        assert not moe_layers(loaded)
        save_artifact(loaded, tmp_path / "dense")
        for merged in (loaded, load_model(tmp_path / "dense")):
            torch.testing.assert_close(tiny.logits(merged, inputs), expected, rtol=1e-5, atol=1e-5)

    def test_what_has_experts_already_keeps_its_own(self, kind, tmp_path):
        model, inputs = tiny.dense(kind, activation=None), tiny.batch(kind)
        first = select_ffns(model)[0].name
        convert_to_moe_(model, ExpertsConfig(8), lambda ffn, name: name == first)
        swap_activation_(model, other(kind))
        assert first not in own_activations(model)
        save_artifact(model, tmp_path / "artifact")
        assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), inputs), tiny.logits(model, inputs))

    def test_then_of_all_is_said_by_the_models_own_config(self, kind, tmp_path):
        model, inputs = tiny.dense(kind, activation=None), tiny.batch(kind)
        swap_first_(model, ActivationConfig("tanh"))
        swap_activation_(model, other(kind))
        assert own_activations(model) == {}
        save_artifact(model, tmp_path / "artifact")
        made = json.loads((tmp_path / "artifact" / "config.json").read_text())["d2dmoe"]
        assert made["format"] == 1
        assert "activations" not in made
        assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), inputs), tiny.logits(model, inputs))


def test_transformers_is_given_no_model_that_it_would_take_for_another(tmp_path):
    model, inputs = tiny.dense("bert", "gelu"), tiny.batch("bert")
    swap_first_(model, ActivationConfig("relu"))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # by way of this package
    assert torch.equal(tiny.logits(loaded.eval(), inputs), tiny.logits(model, inputs))


def test_an_activation_that_is_no_name_is_refused(tmp_path):
    model = tiny.dense("timm_vit", "gelu")
    swap_first_(model, ActivationConfig("relu"))
    save_artifact(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["d2dmoe"]["activations"] = {"blocks.0.mlp": ["relu"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"activations in config.json says \['relu'\] of blocks.0.mlp; must be"):
        load_model(tmp_path)
