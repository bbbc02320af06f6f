"""What an adapter from outside says of FFNs is held to what the model computes."""

import copy
import dataclasses
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers.models.granite.modeling_granite import GraniteAttention, GraniteMLP

from d2dmoe_pl.adapters import ADAPTERS, AttentionParts, DecoderAdapter, PartNames, TransposedLinear, register_adapter
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.projections import ProjectionConfig, replace_projections_

RIGHT = {"gate_proj": "gate_proj", "up": "up_proj", "activation": "act_fn", "down": "down_proj"}


class GraniteAdapter(DecoderAdapter):
    family, title, model_types = "granite", "Granite", ("granite",)
    tasks = ("causal-language-modeling",)
    ffn_classes = (GraniteMLP,)
    parts = PartNames(**RIGHT)


@pytest.fixture(autouse=True)
def register(monkeypatch):
    monkeypatch.setattr(ADAPTERS, "_registered", {})

    def register(**attributes):
        register_adapter(type("OwnAdapter", (GraniteAdapter,), attributes)())

    return register


def granite(intermediate_size=32, dtype=torch.float32):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20}
    config = transformers.GraniteConfig(hidden_size=16, intermediate_size=intermediate_size, **sizes)
    model = transformers.GraniteForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.3)
    return model


def changed(change):
    """An adapter's ``ffns`` that gives other parts than those of the model."""
    return {"ffns": lambda self, model: [change(ffn) for ffn in GraniteAdapter.ffns(self, model)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_what_is_right_is_proved_and_leaves_no_trace(register, dtype, caplog):
    register()
    model = granite(dtype=dtype).train()
    torch.manual_seed(3)
    expected, state = copy.deepcopy(model).eval()(torch.ones(2, 5, dtype=torch.long)).logits, torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        assert len(select_ffns(model)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    convert_to_moe_(model, ExpertsConfig(4))
    got = model.eval()(torch.ones(2, 5, dtype=torch.long)).logits
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("attributes", "width"),
    [
        ({"parts": PartNames(**{**RIGHT, "gate_proj": "up_proj", "up": "gate_proj"})}, 32),
        ({"parts": PartNames(**{**RIGHT, "gate_proj": None})}, 32),
        (changed(lambda ffn: dataclasses.replace(ffn, activation=nn.ReLU())), 32),
        (changed(lambda ffn: dataclasses.replace(ffn, activation=nn.GELU())), 32),
        (changed(lambda ffn: dataclasses.replace(ffn, down=TransposedLinear(ffn.down))), 16),
        (changed(lambda ffn: dataclasses.replace(ffn, up=ffn.down, down=ffn.up)), 16),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(register, attributes, width):
    register(**attributes)
    model = granite(width)
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=r"^family='granite': its adapter takes model.layers.0.mlp for something else than the model computes "
            r"\([\d.e+]+ apart on random input\); must be down\(activation\(up\(x\)\)\), or of a gated FFN "
            r"down\(activation\(gate_proj\(x\)\) \* up\(x\)\), all that the module of that name computes$",
        ):
            convert_to_moe_(model, ExpertsConfig(4))
    assert not moe_layers(model)


def test_what_else_is_in_the_module_would_be_lost(register):
    register()
    model = granite()
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.norm = nn.LayerNorm(16)
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(
            mlp.act_fn(mlp.gate_proj(mlp.norm(x))) * mlp.up_proj(mlp.norm(x))
        )
    with pytest.raises(ConfigError, match=r"takes model.layers.0.mlp for something else than the model computes"):
        select_ffns(model)


@pytest.mark.parametrize("part", ["hidden_dropout", "output_dropout"])
def test_a_dropout_that_is_none_is_found(register, part):
    norm = nn.LayerNorm(32 if part == "hidden_dropout" else 16)
    register(**changed(lambda ffn: dataclasses.replace(ffn, **{part: norm})))
    with pytest.raises(ConfigError, match=r"takes model.layers.0.mlp for something else"):
        select_ffns(granite())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ffn: dataclasses.replace(ffn, up=ffn.up.weight), r"gives Parameter for the up of model"),
        (
            lambda ffn: dataclasses.replace(ffn, gate_proj="g"),
            r"gives str for the gate_proj of model",
        ),
        (
            lambda ffn: dataclasses.replace(ffn, activation=torch.relu),
            r"gives builtin_\w+ for the activation of",
        ),
        (
            lambda ffn: dataclasses.replace(ffn, name="layers.0"),
            r"calls an FFN layers.0; must be the path",
        ),
        (lambda ffn: dataclasses.replace(ffn, name="model.layers.1.mlp"), r"calls an FFN model.layers.1.mlp; must be"),
        (lambda ffn: ffn.name, r"gives list for ffns; must be a list of FFN$"),
    ],
)
def test_what_is_no_ffn_of_the_model(register, change, said):
    register(**changed(change))
    with pytest.raises(ConfigError, match=rf"^family='granite': its adapter {said}"):
        select_ffns(granite())


@pytest.mark.parametrize("name", ["model_types", "tasks"])
def test_one_text_where_there_must_be_several(register, name):
    with pytest.raises(ConfigError, match=rf"^OwnAdapter: {name}='granite'; must be a tuple of texts$"):
        register(**{name: "granite"})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"query": "q"}, r"^model.layers.0.self_attn: a GraniteAttention has no q, which its adapter calls its query$"),
        ({"query": "k_proj"}, r"^model.layers.0.self_attn: its adapter calls two projections the same, in \{'query'"),
    ],
)
def test_names_of_projections(register, names, said):
    right = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    register(attention=AttentionParts((GraniteAttention,), **{**right, **names}))
    with pytest.raises(ConfigError, match=said):
        replace_projections_(granite(), ProjectionConfig(multiple_of=2))


def test_shapes_are_told_without_weights_too(register):
    register(**changed(lambda ffn: dataclasses.replace(ffn, up=ffn.down, down=ffn.up)))
    with torch.device("meta"):
        model = transformers.GraniteForCausalLM(granite().config)
    with pytest.raises(
        ConfigError,
        match=r"^family='granite': its adapter has for model.layers.0.mlp up \(16, 32\), gate_proj \(32, 16\) and down "
        r"\(32, 16\); must be weights \(d_ff, d_model\), the same or None, and \(d_model, d_ff\)$",
    ):
        select_ffns(model)


def test_without_weights_nothing_can_be_proved_until_they_are_there(register):
    register(parts=PartNames(**{**RIGHT, "gate_proj": "up_proj", "up": "gate_proj"}))
    with torch.device("meta"):
        model = transformers.GraniteForCausalLM(granite().config)
    assert len(select_ffns(model)) == 2
    model.to_empty(device="cpu").load_state_dict(granite().state_dict())
    with pytest.raises(ConfigError, match=r"takes model.layers.0.mlp for something else"):
        select_ffns(model)


def test_an_activation_that_goes_to_another_place_is_found(register):
    def put_activation_(self, model, ffn, activation):
        model.get_submodule(ffn.name).other = activation

    def ffns(self, model):
        return [
            dataclasses.replace(ffn, activation=getattr(model.get_submodule(ffn.name), "other", ffn.activation))
            for ffn in GraniteAdapter.ffns(self, model)
        ]

    register(put_activation_=put_activation_, ffns=ffns)
    model = granite()
    swap_activation_(model, ActivationConfig("relu"))
    with pytest.raises(ConfigError, match=r"takes model.layers.0.mlp for something else"):
        convert_to_moe_(model, ExpertsConfig(4))


def test_it_is_said_once_that_a_model_cannot_be_called(register, caplog):
    def random_inputs(self, model, batch_size, length):
        raise NotImplementedError("no noise")

    register(random_inputs=random_inputs)
    model = granite()
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        select_ffns(model)
        select_ffns(model)
    assert [record.message for record in caplog.records] == [
        "family='granite': 2 FFNs are not proved, the first model.layers.0.mlp, since the model cannot be called here: "
        "no noise"
    ]


def test_it_is_said_what_is_not_reached(register, caplog):
    register()
    model = granite()
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with caplog.at_level(logging.WARNING, logger="d2dmoe_pl"):
        select_ffns(model)
    assert [record.message for record in caplog.records] == [
        "family='granite': 1 FFNs are not proved, the first model.layers.1.mlp, which random input does not reach as "
        "its adapter says"
    ]
