"""What a model computes beside its weights is saved with it, or refused in a line."""

import re

import pytest
import timm
import tiny
import torch
from digits_models import digits_source
from torch import nn

from d2dmoe_pl.adapters import TimmModel
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.phases import FineTuning


def another_in_ffns(model):
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.SiLU()


def another_in_experts(model):
    convert_to_moe_(model, ExpertsConfig(8))
    layer = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    layer.activation = nn.SiLU()


def another_before_conversion(model):
    another_in_ffns(model)
    convert_to_moe_(model, ExpertsConfig(8))


def another_epsilon(model):
    model.bert.encoder.layer[0].output.LayerNorm.eps = 0.1


def another_pooler(model):
    model.bert.pooler.activation = nn.ReLU()


@pytest.mark.parametrize(
    ("change", "part", "there", "meant"),
    [
        (another_in_ffns, "encoder.layer.0.intermediate.intermediate_act_fn", "SiLU()", "ReLU()"),
        (another_before_conversion, "encoder.layer.0.intermediate.experts.activation", "SiLU()", "ReLU()"),
        (another_in_experts, "encoder.layer.0.intermediate.experts.activation", "SiLU()", "ReLU()"),
        (another_epsilon, "encoder.layer.0.output.LayerNorm.eps", "0.1", "1e-12"),
        (another_pooler, "pooler.activation", "ReLU()", "Tanh()"),
    ],
)
def test_what_the_config_does_not_say_is_refused(tmp_path, change, part, there, meant):
    model = tiny.dense("bert")
    change(model)
    said = f"bert.{part} is {there}, where one made by its config has {meant}, so that it could not be loaded; change"
    with pytest.raises(ConfigError, match=re.escape(said)):
        save_artifact(model, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_of_timm(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    model.reset_classifier(3, global_pool="avg")
    with pytest.raises(ConfigError, match=r"VisionTransformer: global_pool is 'avg', where one made by its config has"):
        save_artifact(model, tmp_path / "artifact")


@pytest.mark.parametrize("change", ["another class", "dropout", "swapped"])
def test_what_computes_the_same_is_saved(tmp_path, change):
    model = tiny.dense("bert").eval()
    inputs = tiny.batch("bert")
    if change == "another class":
        for layer in model.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = nn.Threshold(0.0, 0.0)  # what ReLU is
    elif change == "dropout":
        model.bert.encoder.layer[0].output.dropout = nn.Identity()
    else:
        swap_activation_(model, ActivationConfig("silu"))
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


class ByHand(TimmModel):
    """A source whose models have an activation that nothing says."""

    def build(self, label_names):
        model = super().build(label_names)
        for block in model.blocks:
            block.mlp.act = nn.SiLU()
        return model


def test_a_phase_says_so_before_it_trains(trainer, digits):
    given = digits_source()
    source = ByHand(given.architecture, **given.model_args)
    with pytest.raises(ConfigError, match=r"VisionTransformer: blocks\.0\.mlp\.act is SiLU\(\), where one made by its"):
        trainer().fit(FineTuning(source=source), datamodule=digits)
