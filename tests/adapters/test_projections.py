"""What every adapter must do about attention projections, held over all architectures; and what cannot be done."""

import copy
import json
from collections import Counter

import pytest
import tiny
import torch
from timm.models.eva import EvaAttention
from torch import nn
from transformers.pytorch_utils import Conv1D

from d2dmoe_pl.adapters import ADAPTERS, ROLES, HuggingFaceModel, adapter_for, adapter_named, put_projection_
from d2dmoe_pl.adapters._attention import find_projections
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import dense_ffn_flops, flops_outside_ffns, sample_inputs
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.projections import (
    ProjectionConfig,
    describe_projections,
    projection_mlps,
    replace_projections_,
    select_projections,
)
from d2dmoe_pl.structure import describe

# one of each architecture: what a task adds lies outside the attention
KINDS = [
    kind
    for kind, task in tiny.TASKS.items()
    if task in ("text-classification", "image-classification", "audio-classification")
    and adapter_named(tiny.family_of(kind)).attention is not None
]


SOME = {"deberta_v2": ("value", "output"), "timm_eva": ("output",)}  # of kinds of which not all can be replaced
CROSS = ("EncDecAttention", "encoder_attn")


def roles_of(kind):
    """The roles that are named, each as often as there are self-attentions."""
    attentions = 4 if tiny.family_of(kind) in tiny.ENCODER_DECODERS else 2
    return dict.fromkeys(SOME.get(kind, ROLES), attentions)


def is_projection(kind, name):
    """Whether the linear module ``name`` is one of those that are named."""
    if any(part in name for part in CROSS) or ".head." in name or "att" not in name.lower():
        return False
    return kind not in SOME or name.endswith((".output.dense", ".attn.proj", ".value_proj"))


def as_linear(projection):
    """A module that computes what the projection computes."""
    linear = nn.Linear(projection.d_in, projection.d_out, bias=projection.bias is not None)
    tensors = {"weight": projection.weight, "bias": projection.bias}
    linear.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return linear


def test_every_family_is_under_contract():
    assert {tiny.family_of(kind) for kind in KINDS} == {
        family for family in ADAPTERS.names() if adapter_named(family).attention is not None
    }


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    def test_finds_all_projections_that_the_model_has(self, kind):
        model = tiny.dense(kind)
        projections = select_projections(model)
        linear = {
            id(module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and is_projection(kind, name)
        }
        assert {id(model.get_submodule(projection.place)) for projection in projections} == linear
        assert Counter(projection.role for projection in projections) == roles_of(kind)
        assert len({projection.name for projection in projections}) == len(projections)

    def test_its_part_of_what_its_module_gives(self, kind):
        model = tiny.dense(kind)
        for projection in select_projections(model):
            x = torch.randn(2, 3, projection.d_in)
            gives = projection.part_of(model.get_submodule(projection.place)(x))
            torch.testing.assert_close(gives, as_linear(projection)(x), rtol=1e-5, atol=1e-5)

    def test_each_put_in_by_itself_computes_what_it_computed(self, kind):
        model, inputs = tiny.dense(kind), tiny.batch(kind)
        expected = tiny.logits(model, inputs)
        projections = select_projections(model)
        for left, projection in zip(reversed(range(len(projections))), projections, strict=True):
            put_projection_(model, projection, nn.Sequential(as_linear(projection)))
            assert len(adapter_for(model).projections(model)) == left
            torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=1e-5, atol=1e-5)

    def test_all_experts_on_equals_dense_in_logits_and_gradients(self, kind):
        dense = tiny.with_projections(kind)
        converted = copy.deepcopy(dense)
        ffns = select_ffns(converted)
        named = sum(roles_of(kind).values())
        assert [ffn.is_projection for ffn in ffns] == [False] * (len(ffns) - named) + [True] * named
        order = {ffn.name: torch.randperm(ffn.d_ff) % (4 if ffn.is_projection else 8) for ffn in ffns}
        convert_to_moe_(converted, ExpertsConfig(8, 4), assignments=order)
        assert set(moe_layers(converted)) == {ffn.name for ffn in ffns}
        inputs = tiny.batch(kind)
        expected, got = (tiny.logits_of_tokens(model, inputs) for model in (dense, converted))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for result in (expected, got):
            result.square().sum().backward()
        gradients = dict(converted.named_parameters())
        for name, parameter in dense.named_parameters():
            if name in gradients:
                assert (gradients[name].grad is None) == (parameter.grad is None)  # a head that is not used has none
                if parameter.grad is not None:
                    scale = max(1.0, float(parameter.grad.abs().max()))
                    torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-4 * scale)
        for name, mlp in projection_mlps(dense).items():
            rows = projection_mlps(converted)[name].mlp.experts.up_weight.grad.flatten(0, 1)
            in_order = mlp.mlp.up.weight.grad[order[f"{name}.mlp"].argsort(stable=True)]
            torch.testing.assert_close(rows, in_order, rtol=1e-4, atol=1e-4)

    def test_save_load_run_gives_the_same_bits(self, kind, tmp_path):
        for stage, model in (("dense", tiny.with_projections(kind)), ("routed", tiny.with_projections(kind, True))):
            if stage == "routed":
                tiny.route_(model)
            save_artifact(model, tmp_path / stage, [PhaseRecord("Test")])
            loaded, inputs = load_model(tmp_path / stage), tiny.batch(kind)
            assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
            assert describe(loaded) == describe(model)
            assert describe_projections(loaded) == describe_projections(model)
            recorded = json.loads((tmp_path / stage / "config.json").read_text())["d2dmoe"]["projections"]
            assert len(recorded) == sum(roles_of(kind).values())


@pytest.mark.parametrize("kind", ["llama", "timm_vit"])  # of two widths, and fused
def test_costs_no_more_than_it_did_and_is_counted(kind):
    before, model = tiny.dense(kind), tiny.with_projections(kind)
    batch = {**adapter_for(model).random_inputs(model, 1, 6), "labels": tiny.batch(kind, 1)["labels"]}
    shapes = sample_inputs(batch, ())
    dense, with_mlps = (
        flops_outside_ffns(before, shapes),
        flops_outside_ffns(model, shapes),
    )  # all, without experts
    assert 0.8 * dense < with_mlps <= dense
    convert_to_moe_(model, ExpertsConfig(8, 4))
    tokens = {}
    for layer in moe_layers(model).values():
        layer.register_forward_pre_hook(lambda layer, args: tokens.update({layer: args[0][..., 0].numel()}))
    tiny.logits(model, batch)
    inside = sum(count * dense_ffn_flops(layer.experts) for layer, count in tokens.items())
    assert flops_outside_ffns(model, shapes) + inside == with_mlps


def test_padding_is_neither_routed_nor_able_to_matter():
    model, inputs = tiny.route_(tiny.with_projections("bert")), tiny.batch("bert")
    seen = []
    for layer in moe_layers(model).values():
        layer.watch(lambda mask: seen.append(len(mask)))
    expected = tiny.logits(model, inputs)
    assert seen == [int(inputs["attention_mask"].sum())] * 10
    padding = inputs["attention_mask"] == 0
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 9)}
    torch.testing.assert_close(tiny.logits(model, other), expected)


def test_width_follows_cost_and_config():
    class Shape:
        name, d_in, d_out = "projection", 768, 768

    assert ProjectionConfig().width_for(Shape) == 384
    assert ProjectionConfig(multiple_of=100).width_for(Shape) == 300
    assert ProjectionConfig(width=7).width_for(Shape) == 7
    Shape.d_out = 256  # keys of grouped queries
    assert ProjectionConfig(multiple_of=1).width_for(Shape) == 192


def test_residual_where_widths_are_the_same():
    model = tiny.with_projections("llama", residual=True)
    mlps = projection_mlps(model)
    assert {name.rpartition(".")[2]: mlp.residual for name, mlp in mlps.items()} == {
        "q_proj": True, "k_proj": False, "v_proj": False, "o_proj": True
    }  # fmt: skip
    x, mlp = torch.randn(3, 24), next(iter(mlps.values()))
    torch.testing.assert_close(mlp(x), x + mlp.mlp.down(mlp.mlp.up(x).relu()))


def test_cross_attention_is_left_alone():
    config = tiny.bert_config(is_decoder=True, add_cross_attention=True)
    model = HuggingFaceModel("text-classification", config=config).build(tiny.LABELS)
    assert any("crossattention" in name for name, _ in model.named_modules())
    names = [projection.name for projection in select_projections(model)]
    assert len(names) == 8
    assert not any("crossattention" in name for name in names)


def test_positions_with_projections_of_their_own_leave_all_to_be_replaced():
    config = tiny.CONFIGS["deberta_v2"]()
    config.share_att_key = False
    model = HuggingFaceModel("text-classification", config=config).build(tiny.LABELS).eval()
    projections = select_projections(model)
    assert Counter(projection.role for projection in projections) == dict.fromkeys(ROLES, 2)
    inputs = tiny.batch("deberta_v2")
    expected = model(**inputs).logits
    for projection in projections:
        put_projection_(model, projection, nn.Sequential(as_linear(projection)))
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"qkv_fused": False}, ["q_proj", "k_proj", "v_proj", "proj"]),
        ({"qkv_bias": False}, ["qkv.query", "qkv.key", "qkv.value", "proj"]),
        ({"qkv_bias_separate": True}, ["qkv.query", "qkv.key", "qkv.value", "proj"]),
        ({}, ["proj"]),
    ],
)
def test_eva_where_its_module_is_called(kwargs, names):
    attention = EvaAttention(24, num_heads=4, scale_norm=False, **kwargs).eval()
    model, x = nn.ModuleDict({"attn": attention}), torch.randn(2, 5, 24)
    for name, bias in attention.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(bias)
    expected = attention(x)
    projections = find_projections(model, adapter_named("timm_eva").attention)
    assert [projection.name for projection in projections] == [f"attn.{name}" for name in names]
    for projection in projections:
        put_projection_(model, projection, nn.Sequential(as_linear(projection)))
    torch.testing.assert_close(attention(x), expected)


class TestRefused:
    def refused(self, model, message, config=None):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError, match=message):
            replace_projections_(model, config or ProjectionConfig())
        assert model.state_dict().keys() == before.keys()

    def test_a_fused_projection_of_another_kind(self):
        model = tiny.dense("gpt2")
        model.transformer.h[1].attn.c_attn = nn.Linear(24, 50)
        self.refused(model, r"transformer.h.1.attn.c_attn: a Linear of 50 outputs, which cannot be taken apart")
        model.transformer.h[1].attn.c_attn = nn.Conv1d(24, 72, 1)
        self.refused(model, r"transformer.h.1.attn.c_attn: a Conv1d of 0 outputs, which cannot be taken apart")

    def test_an_attention_of_another_kind(self):
        model = tiny.dense("timm_vit")
        model.blocks[1].attn = nn.Identity()
        self.refused(model, "blocks.1: its attention is gated or no plain one, and its projections cannot be taken")

    def test_a_gated_attention(self):
        model = tiny.dense("timm_vit")
        model.blocks[0].attn.gate = nn.Linear(16, 16)
        self.refused(model, "blocks.0: its attention is gated or no plain one")

    def test_a_family_that_does_not_name_them(self, monkeypatch):
        monkeypatch.setattr(type(adapter_named("vit")), "attention", None)
        self.refused(
            tiny.dense("vit"),
            "vit: its adapter names no attention projections; to name them, set attention in d2dmoe_pl.adapters.vit",
        )

    def test_a_second_time(self):
        self.refused(tiny.with_projections(), "VisionTransformer: no linear attention projection found$")

    def test_more_than_the_width(self):
        self.refused(
            tiny.dense("bert"),
            r"multiple_of=16: must be at most 12, the width of an MLP that costs what bert.encoder.layer.0.attention",
            ProjectionConfig(multiple_of=16),
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"width": 0}, "width=0: an MLP needs at least one"), ({"multiple_of": 0}, "multiple_of=0: must be positive")],
    )
    def test_bad_numbers(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            ProjectionConfig(**arguments)

    def test_experts_that_do_not_divide_the_width(self):
        model = tiny.with_projections("bert")
        name = "bert.encoder.layer.0.attention.self.query.mlp"
        with pytest.raises(
            ConfigError,
            match=f"num_experts=8: must divide the FFN width, which is 12 in {name}; num_projection_experts is for",
        ):
            convert_to_moe_(model, ExpertsConfig(8))
        with pytest.raises(ConfigError, match="num_projection_experts=5: must divide the FFN width, which is 12"):
            convert_to_moe_(model, ExpertsConfig(8, 5))
        assert not moe_layers(model)
