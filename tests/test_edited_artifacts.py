"""An artifact that was edited by hand, or put together from two, is told in one line."""

import json

import pytest
import safetensors.torch
import tiny
import torch

from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError

LAYER, UP = "blocks.0.mlp", "blocks.0.mlp.experts.up_weight"


@pytest.fixture
def saved(tmp_path):
    save_artifact(tiny.routed(), tmp_path / "artifact")
    return tmp_path / "artifact"


def _refused(folder, told):
    with pytest.raises(ConfigError, match=rf"^{folder}: config.json and the weights beside it make no model \({told}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: made["layers"][LAYER].update(num_experts=2), rf"RuntimeError: .*size mismatch for {UP}"),
        (lambda made: made["layers"][LAYER].update(num_experts="4"), "TypeError: "),
        (lambda made: made["layers"][LAYER].pop("router"), "KeyError: 'router'"),
        (lambda made: made["layers"][LAYER]["router"].update(depth=2), "TypeError: .*'depth'"),
        (lambda made: made["layers"][LAYER].update(gate="dynk_max"), "TypeError: "),
        (lambda made: made["layers"].update({LAYER: None}), "AttributeError: "),
        (lambda made: made["layers"].pop(LAYER), "RuntimeError: .*Missing key"),
        (lambda made: made.update(budgets={}), "KeyError: "),
        (lambda made: made.update(family="bert"), "KeyError: "),
    ],
)
def test_a_description_that_is_not_of_the_weights(saved, change, told):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    change(config["d2dmoe"])
    file.write_text(json.dumps(config))
    _refused(saved, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(UP), f"RuntimeError: .*Missing key.*{UP}"),
        (lambda tensors: tensors.update({UP: tensors[UP][1:]}), f"RuntimeError: .*size mismatch for {UP}"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.int64)}), "RuntimeError: Only Tensors of floating"),
        (lambda tensors: tensors.update({"more": tensors[UP][0].clone()}), 'RuntimeError: .*Unexpected key.*"more"'),
    ],
)
def test_weights_that_are_not_of_the_description(saved, change, told):
    file = saved / "d2dmoe.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    _refused(saved, told)


@pytest.mark.parametrize("content", [b"3", b"[]", b"\xff"])
def test_a_config_that_is_none(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^path='.*': no artifact, config.json "):
        load_model(saved)
