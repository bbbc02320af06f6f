"""An artifact that was edited by hand, or put together from two, is told in one line."""

import json

import pytest
import safetensors.torch
import tiny
import torch

from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.quantization.quantize import quantize_

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
        (
            lambda made: made["layers"][LAYER].update(num_experts="4"),
            "SettingTypeError: num_experts='4': has the type str; must be int",
        ),
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
        (lambda tensors: tensors.update({"more": tensors[UP][0].clone()}), 'RuntimeError: .*Unexpected key.*"more"'),
    ],
)
def test_weights_that_are_not_of_the_description(saved, change, told):
    file = saved / "d2dmoe.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    _refused(saved, told)


def _put(folder, name, dtype):
    """Put one tensor of a model's file there in another type."""
    file = folder / "d2dmoe.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**tensors, name: tensors[name].to(dtype)}, file)


def _scales_in_int8(folder):
    model = tiny.routed()
    quantize_(model.to(torch.bfloat16))
    save_artifact(model, folder)


MADE = {
    "float32": lambda folder: save_artifact(tiny.routed(), folder),
    "bfloat16": lambda folder: save_artifact(tiny.routed().to(torch.bfloat16), folder),
    "int8": _scales_in_int8,
}


@pytest.mark.parametrize(
    ("made", "name", "dtype", "told"),
    [
        ("float32", UP, "float64", "is of float64 and most other weights are of float32; must be of float32"),
        ("float32", "norm.bias", "float16", "is of float16 and most other weights are of float32; must be of float32"),
        ("bfloat16", UP, "float32", "is of float32 and most other weights are of bfloat16; must be of bfloat16"),
        ("int8", "norm.bias", "float32", "is of float32 and most other weights are of bfloat16; must be of bfloat16"),
        (
            "int8",
            "head.scale",
            "float64",
            "is of float64 and most other weights are of bfloat16; must be of float32 or bfloat16",
        ),
        ("int8", "head.weight", "float32", "is of float32; must be of int8"),
        ("float32", UP, "int64", "is of int64; must be of float32"),
    ],
)
def test_a_tensor_of_another_type_than_it_was_written_in(tmp_path, made, name, dtype, told):
    MADE[made](tmp_path / "artifact")
    _put(tmp_path / "artifact", name, getattr(torch, dtype))
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/artifact: {name} {told}, as it was written$"):
        load_model(tmp_path / "artifact")


def _of_several_types():
    model = tiny.routed("bert").to(torch.bfloat16)
    model.classifier.float()
    return model


@pytest.mark.parametrize("made", [*MADE, "several types"])
def test_types_that_are_written_are_read_and_cast(tmp_path, made):
    folder = tmp_path / "artifact"
    MADE.get(made, lambda folder: save_artifact(_of_several_types(), folder))(folder)
    types = {name: tensor.dtype for name, tensor in load_model(folder).state_dict().items()}
    file = folder / "d2dmoe.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert types == {name: tensor.dtype for name, tensor in tensors.items()}
    for dtype in ("float32", "bfloat16"):  # all of them at once, as a script that knows no names does
        cast = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in tensors.items()}
        safetensors.torch.save_file(cast, file)
        load_model(folder)


def test_of_an_artifact_that_does_not_say_its_types_nothing_is_told(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["d2dmoe"].pop("types") == {}
    (saved / "config.json").write_text(json.dumps(config))
    _put(saved, "norm.bias", torch.float64)
    assert load_model(saved).norm.bias.dtype == torch.float64


@pytest.mark.parametrize("content", [b"3", b"[]", b"\xff"])
def test_a_config_that_is_none(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^path='.*': no artifact, config.json "):
        load_model(saved)
