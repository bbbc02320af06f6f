"""In-place conversion validates everything before it touches anything."""

import copy

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import holder_of
from d2dmoe_pl.errors import ConfigError, SettingTypeError
from d2dmoe_pl.moe.activations import swap_activation_
from d2dmoe_pl.moe.conversion import (
    ExpertsConfig,
    add_routers_,
    add_stand_ins_,
    convert_to_moe_,
    set_backend_,
    set_gate_,
    set_tau_,
    temporary_gate,
)
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.structure import describe, restore_, stage_of


def test_width_not_divisible_leaves_the_model_as_it_was():
    model = tiny.dense()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"num_experts=7: must divide the FFN width, which is 48 in blocks.0.mlp"):
        convert_to_moe_(model, ExpertsConfig(7))
    assert list(model.state_dict()) == list(before)
    assert not moe_layers(model)


def test_a_bad_assignment_of_the_last_layer_leaves_the_first_as_it_was():
    model = tiny.dense()
    good = torch.arange(48) % 8
    with pytest.raises(ConfigError, match=r"assignment of blocks.1.mlp"):
        convert_to_moe_(model, ExpertsConfig(8), assignments={"blocks.0.mlp": good, "blocks.1.mlp": good * 0})
    assert not moe_layers(model)


def test_filter_converts_some_and_nothing_matched_is_an_error():
    model = tiny.dense()
    convert_to_moe_(model, ExpertsConfig(8), lambda ffn, name: name == "blocks.1.mlp")
    assert list(moe_layers(model)) == ["blocks.1.mlp"]
    assert [ffn.name for ffn in select_ffns(model)] == ["blocks.0.mlp"]
    with pytest.raises(ConfigError, match="no dense FFN found that the filter admits"):
        convert_to_moe_(model, ExpertsConfig(8), lambda ffn, name: False)


def test_a_converted_model_has_no_dense_ffn_left():
    with pytest.raises(ConfigError, match="VisionTransformer: no dense FFN found"):
        convert_to_moe_(tiny.routed(), ExpertsConfig(8))


def test_routers_need_experts_and_gates_need_routers():
    model = tiny.dense()
    with pytest.raises(ConfigError, match="no MoE layer found"):
        add_routers_(model, RouterConfig(8))
    convert_to_moe_(model, ExpertsConfig(8))
    with pytest.raises(ConfigError, match=r"blocks.0.mlp: has no router yet"):
        set_gate_(model, GateConfig())
    add_routers_(model, RouterConfig(8))
    with pytest.raises(ConfigError, match=r"blocks.0.mlp: has no gate"):
        set_tau_(model, 0.5)


def test_tau_one_equals_dense():
    dense = tiny.dense()
    model = copy.deepcopy(dense)
    convert_to_moe_(model, ExpertsConfig(8))
    add_routers_(model, RouterConfig(8))
    set_gate_(model, GateConfig("dynk_max", 1.0))
    inputs = tiny.batch()
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(dense, inputs), rtol=1e-5, atol=1e-6)
    set_tau_(model, 0.0)
    assert not torch.allclose(tiny.logits(model, inputs), tiny.logits(dense, inputs), rtol=1e-2)


def test_backends_agree_on_a_whole_model():
    for kind in ("bert", "timm_vit"):
        model = tiny.routed(kind, tau=0.4)
        inputs = tiny.batch(kind)
        expected = tiny.logits(model, inputs)
        set_backend_(model, "grouped")
        torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_another_gate_for_a_while():
    model = tiny.routed(tau=0.5)
    before = describe(model)
    with temporary_gate(model, GateConfig("topk", 0.25)):
        assert {made["gate"]["rule"] for made in describe(model).values()} == {"topk"}
    assert describe(model) == before
    with pytest.raises(RuntimeError, match="inside"), temporary_gate(model, None):
        raise RuntimeError("inside")
    assert describe(model) == before


def test_describe_and_restore_are_inverse():
    model = tiny.routed("vit", num_experts=4)
    set_backend_(model, "grouped")
    other = tiny.dense("vit")
    restore_(other, describe(model))
    assert describe(other) == describe(model)
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_stages():
    model = tiny.dense()
    assert stage_of(describe(model)) == "dense"
    convert_to_moe_(model, ExpertsConfig(8))
    assert stage_of(describe(model)) == "experts"
    add_routers_(model, RouterConfig(8))
    assert stage_of(describe(model)) == "routed"


def test_gradients_reach_executed_experts_only():
    model = tiny.routed(num_experts=4)
    layer = next(iter(moe_layers(model).values()))
    mask = torch.tensor([[True, False, True, False]])
    layer.experts(torch.randn(1, 16), mask).sum().backward()
    assert layer.experts.down_weight.grad.flatten(1).abs().sum(dim=1).gt(0).tolist() == [True, False, True, False]


def _same_module(model):
    first, second = model.bert.encoder.layer
    second.intermediate, second.output = first.intermediate, first.output
    return r"bert.encoder.layer.0.intermediate: is the same module as bert.encoder.layer.1.intermediate; must have one"


def _shared_weight(model):
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    return (
        r"intermediate: shares weights with bert.encoder.layer.1.intermediate.dense, which would no longer be the same"
    )


def _quantised(model):
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    return (
        r"layer.1.intermediate: is quantised already, its weights are torch.int8 of Linear; must be made into experts"
    )


class _Packed(torch.nn.Module):
    def weight(self):
        """What PyTorch's own quantised layers have in the place of a tensor."""


def _packed(model):
    model.bert.encoder.layer[0].intermediate.dense = _Packed()
    return r"layer.0.intermediate: is quantised already, its weights are packed of _Packed; must be made into experts"


def _of_two_types(model):
    model.bert.encoder.layer[0].output.dense.half()
    return r"layer.0.intermediate: its weights are torch.float16 and torch.float32; must be of one type, see model.to"


@pytest.mark.parametrize("spoil", [_same_module, _shared_weight, _quantised, _packed, _of_two_types])
def test_ffns_that_are_more_or_other_than_dense_layers_of_their_own(spoil):
    model = tiny.dense("bert")
    message = spoil(model)
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        convert_to_moe_(model, ExpertsConfig(8))
    assert list(model.state_dict()) == before


def test_a_layer_that_is_run_twice_is_one():
    model = tiny.dense("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    inputs = tiny.batch("bert")
    expected = tiny.logits(model, inputs)
    convert_to_moe_(model, ExpertsConfig(8))
    assert len(moe_layers(model)) == 1
    torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama-causal-language-modeling", "gpt2-causal-language-modeling"])
def test_what_is_frozen_stays_frozen(kind):
    model = tiny.dense(kind)
    ffn = select_ffns(model)[0]
    for linear in filter(None, (ffn.up, ffn.gate_proj, ffn.down)):
        holder_of(linear).requires_grad_(False)
    convert_to_moe_(model, ExpertsConfig(8))
    frozen, other, *_ = moe_layers(model).values()
    assert not any(parameter.requires_grad for parameter in frozen.experts.parameters())
    assert all(parameter.requires_grad for parameter in other.experts.parameters())


@pytest.mark.parametrize(
    ("function", "given", "kind"),
    [
        (convert_to_moe_, 8, "ExpertsConfig"),
        (add_routers_, None, "RouterConfig"),
        (set_gate_, "dynk_max", "GateConfig"),
        (add_stand_ins_, 4, "StandInConfig"),
        (swap_activation_, "relu", "ActivationConfig"),
    ],
)
def test_configs_of_another_kind_are_named(function, given, kind):
    model = tiny.dense() if function in (convert_to_moe_, swap_activation_) else tiny.routed()
    with pytest.raises(SettingTypeError, match=f"config: is {type(given).__name__}; must be of the class {kind}"):
        function(model, given)
