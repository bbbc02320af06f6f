"""Back to dense: every family's model is the dense one again, its neurons in another order, and can be saved as one."""

import copy

import pytest
import tiny
import torch

from d2dmoe_pl import ConfigError, ExpertsConfig, convert_to_moe_, load_model, merge_to_dense_, save_artifact
from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns


def scattered_experts_(model, filter_fn=None):
    """Give ``model`` experts whose neurons come from everywhere."""
    ffns = select_ffns(model, filter_fn)
    order = {ffn.name: torch.randperm(ffn.d_ff) % 4 for ffn in ffns}
    convert_to_moe_(model, ExpertsConfig(4), filter_fn, assignments=order)


@pytest.mark.parametrize("kind", tiny.HEADS_ARE_THOROUGH)
@torch.no_grad()
def test_merged_is_dense_again(kind, tmp_path):
    dense, inputs = tiny.dense(kind), tiny.batch(kind)
    expected = tiny.logits_of_tokens(dense, inputs)
    model = copy.deepcopy(dense)
    scattered_experts_(model)
    merge_to_dense_(model)
    assert not moe_layers(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in dense.state_dict().items()
    }
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    torch.testing.assert_close(tiny.logits_of_tokens(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not model._forward_pre_hooks
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))
    save_artifact(model, tmp_path / "artifact")
    assert read_artifact(tmp_path / "artifact").stage == "dense"
    assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), inputs), tiny.logits(model, inputs))


@torch.no_grad()
def test_mlps_in_the_place_of_projections_are_merged_too():
    dense, inputs = tiny.with_projections("bert"), tiny.batch("bert")
    model = copy.deepcopy(dense)
    scattered_experts_(model)
    merge_to_dense_(model)
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(dense, inputs), rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == list(dense.state_dict())


@torch.no_grad()
def test_some_layers_alone():
    model, inputs = tiny.routed("bert", tau=1.0), tiny.batch("bert")
    expected = tiny.logits(model, inputs)
    first, second = moe_layers(model)
    merge_to_dense_(model, lambda layer, name: name == first)
    assert list(moe_layers(model)) == [second]
    torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert model._forward_pre_hooks  # the other layer needs to know padding


def test_type_and_what_is_trained_are_kept():
    model = tiny.dense("gpt2").bfloat16().train()
    scattered_experts_(model)
    for layer in moe_layers(model).values():
        layer.experts.requires_grad_(False)
    merge_to_dense_(model)
    parameters = dict(model.transformer.h[0].mlp.named_parameters())
    assert set(parameters) == {"c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.transformer.h[0].mlp.dropout.training


@pytest.mark.parametrize("make", [tiny.dense, tiny.moebert])
def test_what_has_no_moe_layer_is_refused(make):
    with pytest.raises(ConfigError, match="no MoE layer found"):
        merge_to_dense_(make())
