"""Cost accounting against what torch counts on the products really run."""

import copy

import pytest
import tiny
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.callbacks.sweep_settings import SweepSetting
from d2dmoe_pl.callbacks.sweep_table import sweep_row
from d2dmoe_pl.data import Classification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics import flops
from d2dmoe_pl.metrics.expert_load import LayerLoad, experts_histogram
from d2dmoe_pl.metrics.flops import (
    dense_ffn_flops,
    flops_outside_ffns,
    pair_flops,
    sample_inputs,
    sample_sizes,
)
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_, set_backend_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moebert.layer import moebert_layers


def counted(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_formulas_by_hand():
    layer = next(iter(moe_layers(tiny.routed(tau=0.5)).values()))  # d_model 16, d_ff 48, E 8, router width 8
    assert pair_flops(layer.experts) == 2 * 2 * 16 * 6
    assert dense_ffn_flops(layer.experts) == 2 * 2 * 16 * 48
    assert layer.flops_beside_experts(1, 1) == 2 * (16 * 8 + 8 * 8)
    layer.gate.set_tau(1.0)  # where there is nothing to choose
    assert layer.flops_beside_experts(1, 1) == 0


@pytest.mark.parametrize(
    "kind",
    [
        *("bert", "roberta-question-answering", "distilbert-masked-language-modeling", "gpt2", "llama"),
        *("gpt2-causal-language-modeling", "gemma-causal-language-modeling", "gemma-regression"),
        *("vit", "deit-distilled", "timm_vit"),
        *("t5", "t5-regression", "bart", "t5-text-to-text"),  # the heads of which look for the end of a text
    ],
)
def test_flops_outside_ffns_equal_the_dense_models_less_its_ffns(kind):
    dense = tiny.dense(kind)
    inputs = tiny.batch(kind, size=1)
    length = 5 if "attention_mask" in inputs else None
    model = copy.deepcopy(dense)
    convert_to_moe_(model, ExpertsConfig(8))
    one = sample_inputs(inputs, (("attention_mask", length),) if length else ())
    on_cpu = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in one.items()}
    if length:
        noise = adapter_for(dense).random_inputs(dense, 1, length)
        on_cpu |= {key: noise[key] for key in on_cpu.keys() & noise.keys()}
    tokens = length or {"deit-distilled": 6}.get(kind, 5)  # 4 patches, the class token and one for distillation
    ffns = sum(tokens * dense_ffn_flops(layer.experts) for layer in moe_layers(model).values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the CPU's fused kernel is not counted
        whole = counted(lambda: tiny.logits(dense, on_cpu))
    assert flops_outside_ffns(model, one) == whole - ffns
    assert flops_outside_ffns(tiny.routed(kind), one) == whole - ffns  # routers are no part of it
    assert flops_outside_ffns(model.to("meta"), one) == whole - ffns


def test_of_a_model_that_looks_at_values_and_is_parted(monkeypatch):
    monkeypatch.setattr(flops, "is_sharded", lambda model: True)
    one = sample_inputs(tiny.batch("t5"), (("attention_mask", 5),))
    with pytest.raises(ConfigError, match=r"^T5ForSequenceClassification: its FLOPs cannot be counted from shapes"):
        flops_outside_ffns(tiny.routed("t5"), one)


def layer_load(mask):
    return LayerLoad(experts_histogram(mask), float(mask.sum()))


@pytest.mark.parametrize("kind", ["bert", "timm_vit", "gpt2", "llama-causal-language-modeling"])
@pytest.mark.parametrize("tau", [0.2, 0.6, 1.0])
def test_executed_flops_equal_the_products_really_run(kind, tau):
    """Padding and unexecuted experts left out, routers in where they choose: a sweep's sums against torch's counter."""
    model = tiny.routed(kind, tau=tau)
    set_backend_(model, "grouped")
    inputs = tiny.batch(kind, size=4)
    layers, masks = moe_layers(model), []
    with hooked(layer.watch(masks.append) for layer in layers.values()), torch.no_grad():
        tiny.logits(model, inputs)
    inside = 0

    def count_layer(layer, args, output):
        nonlocal inside
        inside += counted(lambda: layer.forward(*args))

    for layer in layers.values():
        layer.register_forward_hook(count_layer)
    with torch.no_grad():
        tiny.logits(model, inputs)
    loads = [layer_load(mask) for mask in masks]
    row = sweep_row(
        "test",
        SweepSetting("tau", tau),
        0.0,
        Classification(["a", "b"]),
        0.0,
        layers,
        loads,
        samples=4,
        flops_outside=0,
    )
    assert row.model_flops * 4 == inside
    dense = sum(
        int(load.histogram.sum()) * dense_ffn_flops(layer.experts)
        for load, layer in zip(loads, layers.values(), strict=True)
    )
    assert row.ffn_flops_percent == pytest.approx(100 * inside / dense)
    assert row.experts_percent == pytest.approx(100 * torch.cat(masks).float().mean().item())


@pytest.mark.parametrize("routing", ["gate_token", "gate_sentence", "hash_random"])
def test_moebert_flops_equal_the_products_really_run(routing):
    model = tiny.moebert(routing)
    dense = tiny.dense("bert")
    inputs = tiny.batch("bert", size=4)
    layers, masks, inside = moebert_layers(model), [], 0

    def count_layer(layer, args, output):
        nonlocal inside
        inside += counted(lambda: layer.forward(*args))

    handles = [layer.watch(masks.append) for layer in layers.values()]
    for layer in layers.values():
        layer.register_forward_hook(count_layer)
    with torch.no_grad():
        tiny.logits(model, inputs)
    for handle in handles:
        handle.remove()
    loads = [layer_load(mask) for mask in masks[::2]]  # every layer ran twice, once to be counted
    row = sweep_row("test", None, 0.0, Classification(["a", "b"]), 0.0, layers, loads, samples=4, flops_outside=0)
    assert row.model_flops * 4 == inside
    assert row.experts_percent == pytest.approx(25)
    gate = {"gate_token": 2 * 24 * 4 * 14, "gate_sentence": 2 * 24 * 4 * 4, "hash_random": 0}[routing]
    pairs, whole = 14 * 2 * 2 * 24 * 12, 14 * 2 * 2 * 24 * 48
    assert row.ffn_flops_percent == pytest.approx(100 * (pairs + gate) / whole)
    one = sample_inputs(inputs, (("attention_mask", 4),))
    converted = copy.deepcopy(dense)
    convert_to_moe_(converted, ExpertsConfig(8))
    assert flops_outside_ffns(model, one) == flops_outside_ffns(converted, one)


def test_sample_sizes_and_inputs():
    inputs = tiny.batch("bert", size=4)
    assert [dict(size) for size in sample_sizes(inputs)] == [{"attention_mask": length} for length in (7, 4, 2, 1)]
    assert {key: tuple(value.shape) for key, value in sample_inputs(inputs, sample_sizes(inputs)[1]).items()} == {
        "input_ids": (1, 4),
        "labels": (1,),
    }
    pictures = tiny.batch("vit")
    (size,) = set(sample_sizes(pictures))
    assert dict(size) == {"pixel_values[0]": 1, "pixel_values[1]": 8, "pixel_values[2]": 8}
    assert sample_inputs(pictures, size)["pixel_values"].shape == (1, 1, 8, 8)


def test_texts_without_a_mask_cost_by_their_length():
    model, costs = tiny.routed("bert"), []
    for length in (3, 9):
        inputs = {"input_ids": torch.ones(2, length, dtype=torch.int64), "labels": torch.zeros(2)}
        costs.append({flops_outside_ffns(model, sample_inputs(inputs, size)) for size in sample_sizes(inputs)})
    assert sample_sizes({"input_ids": torch.ones(2, 3)}) != sample_sizes({"input_ids": torch.ones(2, 9)})
    assert min(costs[1]) > max(costs[0])


def test_sizes_of_texts_and_their_answers():
    inputs = tiny.batch("t5-text-to-text", size=3)
    sizes = sample_sizes(inputs)
    assert [dict(size) for size in sizes] == [
        {"attention_mask": length, "decoder_attention_mask": answer} for length, answer in ((7, 1), (4, 3), (2, 5))
    ]
    shapes = {key: tuple(value.shape) for key, value in sample_inputs(inputs, sizes[1]).items()}
    assert shapes == {"input_ids": (1, 4), "decoder_input_ids": (1, 3), "labels": (1, 5)}


def test_counting_leaves_the_model_as_it_was():
    model = tiny.routed()
    gates = [layer.gate for layer in moe_layers(model).values()]
    flops_outside_ffns(model, sample_inputs(tiny.batch(), ()))
    assert [layer.gate for layer in moe_layers(model).values()] == gates
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in moe_layers(model).values())


def test_what_models_do_in_training_alone_is_left_out():
    """Audio encoders mask spans of frames then, longer than a short recording has any."""
    torch.manual_seed(0)
    config = tiny.CONFIGS["any_audio"]()
    config.mask_time_prob, config.mask_time_length = 0.5, 10
    model = transformers.AutoModelForAudioClassification.from_config(config)
    convert_to_moe_(model, ExpertsConfig(4))
    one = {"input_values": torch.empty(1, 70, device="meta")}
    expected = flops_outside_ffns(model.eval(), one)
    assert flops_outside_ffns(model.train(), one) == expected
    assert model.training
