"""What every adapter must do, held over the whole registry."""

import copy

import pytest
import timm
import tiny
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from d2dmoe_pl.adapters import ADAPTERS, HEADS, adapter_for, adapter_named, holder_of
from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.data.head import LABELLED_HEADS, VOCABULARY_HEADS
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.structure import describe

KINDS = list(tiny.SOURCES)


def test_every_family_is_under_contract():
    assert {(tiny.family_of(kind), tiny.TASKS[kind]) for kind in KINDS} == {
        (family, task) for family in ADAPTERS.names() for task in adapter_named(family).tasks
    }


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    def test_knows_its_own_model_only(self, kind):
        model = tiny.dense(kind)
        matching = [family for family in ADAPTERS.names() if adapter_named(family).matches(model)]
        described = [family for family in matching if not family.startswith("any_")]
        assert (described or matching) == [tiny.family_of(kind)]
        assert adapter_for(model).family == tiny.family_of(kind)

    def test_finds_all_ffns_that_the_model_has(self, kind):
        model = tiny.dense(kind)
        ffns = select_ffns(model)
        widths = {tiny.WIDTH, 2 * tiny.WIDTH}  # of one, and of gate and up in one
        wide = {id(m) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and widths & {*m.weight.shape}}
        # what has by chance as many outputs or inputs: a fused qkv, a classifier of two vectors, a head for pooling
        others = ("qkv", "qkv_proj", "classifier", ".head.mlp.fc1", ".head.mlp.fc2")
        wide -= {id(m) for name, m in model.named_modules() if name.endswith(others)}
        parts = [part for ffn in ffns for part in (ffn.up, ffn.down, ffn.gate_proj) if part is not None]
        assert {id(holder_of(part)) for part in parts} == wide
        stacks = 2 if tiny.family_of(kind) in tiny.ENCODER_DECODERS else 1
        assert len(ffns) == 2 * stacks
        assert len({id(ffn.activation) for ffn in ffns}) == 2 * stacks
        for ffn in ffns:
            assert ffn.up.weight.shape == (ffn.d_ff, ffn.d_model) == (tiny.WIDTH, ffn.down.weight.shape[0])
            assert ffn.input_weight.shape == ffn.up.weight.shape

    def test_runs_on_noise_of_its_own_making(self, kind):
        model = tiny.dense(kind)
        inputs = adapter_for(model).random_inputs(model, 2, 6)
        alike = tiny.batch(kind, size=2)
        for key, value in inputs.items():
            assert value.dtype == alike[key].dtype
            assert value.shape == ((2, 6) if key.endswith("input_ids") else alike[key].shape)
        outputs = tiny.logits(model, inputs)
        assert len(outputs) == 2
        assert adapter_for(model).num_outputs(model) in outputs.shape
        assert not torch.equal(outputs[0], outputs[1])

    def test_all_experts_on_equals_dense_in_logits_and_gradients(self, kind):
        dense = tiny.dense(kind)
        converted = copy.deepcopy(dense)
        order = {ffn.name: torch.randperm(tiny.WIDTH) % 8 for ffn in select_ffns(converted)}
        convert_to_moe_(converted, ExpertsConfig(8), assignments=order)
        inputs = tiny.batch(kind)
        expected, got = (tiny.logits_of_tokens(model, inputs) for model in (dense, converted))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for result in (expected, got):
            result.square().sum().backward()
        gradients = dict(converted.named_parameters())
        for name, parameter in dense.named_parameters():
            if name in gradients:  # everything outside the FFNs
                assert (gradients[name].grad is None) == (parameter.grad is None)  # a head that is not used has none
                if parameter.grad is not None:
                    scale = max(1.0, float(parameter.grad.abs().max()))
                    torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-4 * scale)
        for layer in moe_layers(converted).values():
            assert layer.experts.up_weight.grad.abs().sum() > 0

    def test_save_load_run_gives_the_same_bits(self, kind, tmp_path):
        model = tiny.routed(kind)
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
        loaded = load_model(tmp_path / "artifact")
        inputs = tiny.batch(kind)
        assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
        assert describe(loaded) == describe(model)
        assert read_artifact(tmp_path / "artifact").stage == "routed"

    def test_hidden_states_of_the_embeddings_and_each_layer(self, kind):
        model, inputs = tiny.dense(kind), tiny.batch(kind)
        logits, states = adapter_for(model).logits_and_hidden_states(model, inputs)
        assert torch.equal(logits, tiny.logits(model, inputs))
        if not states:
            assert not adapter_for(model).tells_hidden_states
            return
        stacks = 2 if tiny.family_of(kind) in tiny.ENCODER_DECODERS else 1
        assert len(states) == 3 * stacks
        ffns = select_ffns(model)
        assert {state.shape[::2] for state in states} == {(3, ffns[0].d_model)}
        with torch.no_grad():
            ffns[-1].down.weight.zero_()
        _, changed = adapter_for(model).logits_and_hidden_states(model, inputs)
        same = [torch.equal(*pair) for pair in zip(states, changed, strict=True)]
        assert same == [True] * (len(states) - 1) + [False]

    @torch.no_grad()
    def test_layers_see_the_same_where_logits_are_not_read(self, kind):
        model, batch = tiny.routed(kind), tiny.batch(kind)
        # with padding in front
        batch |= {key: value.flip(1) for key, value in batch.items() if key in ("input_ids", "attention_mask")}
        adapter = adapter_for(model)
        head = adapter.vocabulary_head(model)
        assert (head is not None) == (adapter.head(model) in VOCABULARY_HEADS)
        seen, positions = [], []
        handles = [
            layer.register_forward_hook(lambda _, args, output: seen[-1].extend([*args, output]))
            for layer in moe_layers(model).values()
        ]
        if head is not None:
            handles.append(head.register_forward_hook(lambda _, args, output: positions.append(output.shape[1])))
        with hooked(handles):
            for run in (adapter.logits, adapter.run_layers):
                seen.append([])
                run(model, batch)
        assert len(seen[0]) == len(seen[1]) > 0
        assert all(one.equal(other) for one, other in zip(*seen, strict=True))
        assert head is None or positions[1:] == [1] < positions[:1]

    def test_says_what_head_it_has(self, kind, tmp_path):
        model, adapter = tiny.dense(kind), adapter_named(tiny.family_of(kind))
        head, _ = HEADS[tiny.TASKS[kind]]
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
        for one in (model, load_model(tmp_path / "artifact"), tiny.SOURCES[kind]().build_structure(["a", "b"])):
            assert adapter.head(one) == head
        assert adapter.num_outputs(model) == len(tiny.labels_of(kind))

    def test_unknown_activation_is_refused(self, kind):
        model = tiny.dense(kind)
        with pytest.raises(ConfigError, match="activation='quark': "):
            swap_activation_(model, ActivationConfig("quark"))

    def test_structure_without_weights(self, kind):
        structure = tiny.SOURCES[kind]().build_structure(tiny.labels_of(kind))
        assert all(parameter.is_meta for parameter in structure.parameters())
        shapes = {name: parameter.shape for name, parameter in tiny.dense(kind).named_parameters()}
        assert {name: parameter.shape for name, parameter in structure.named_parameters()} == shapes


@pytest.mark.parametrize("kind", tiny.HEADS_ARE_THOROUGH)
def test_swapped_activation_is_kept(kind, tmp_path):
    model = tiny.dense(kind, activation=None)
    inputs = tiny.batch(kind)
    before = tiny.logits(model, inputs)
    born_sparse = tiny.family_of(kind) in tiny.BORN_SPARSE
    assert [ffn.is_sparse for ffn in select_ffns(model)] == [born_sparse] * len(select_ffns(model))
    swap_activation_(model, ActivationConfig("silu" if born_sparse else "relu"))
    assert [ffn.is_sparse for ffn in select_ffns(model)] == [not born_sparse] * len(select_ffns(model))
    after = tiny.logits(model, inputs)
    assert not torch.allclose(before, after)
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
    assert torch.equal(tiny.logits(load_model(tmp_path / "artifact"), inputs), after)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "timm" not in kind])
def test_dense_hugging_face_artifact_loads_with_transformers(kind, tmp_path):
    model = tiny.dense(kind)
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
    _, auto = HEADS[tiny.TASKS[kind]]
    loaded, report = auto.from_pretrained(tmp_path / "artifact", output_loading_info=True)
    assert not any(report.values())  # no weight missing, left over or of another shape
    inputs = tiny.batch(kind)
    torch.testing.assert_close(tiny.logits(loaded.eval(), inputs), tiny.logits(model, inputs), rtol=1e-5, atol=1e-6)
    if HEADS[tiny.TASKS[kind]][0] in ("regression", *LABELLED_HEADS):
        assert loaded.config.id2label == dict(enumerate(tiny.labels_of(kind)))


def test_question_answering_logits_are_start_and_end():
    model = tiny.dense("bert-question-answering")
    inputs = {key: value for key, value in tiny.batch("bert-question-answering").items() if key != "labels"}
    output = model(**inputs)
    got = tiny.logits(model, {**inputs, "labels": torch.zeros(3, 2), "offsets": torch.zeros(3, 7, 2)})
    assert torch.equal(got, torch.stack([output.start_logits, output.end_logits], dim=1))


def test_a_regression_artifact_is_one_for_transformers_too(tmp_path):
    save_artifact(tiny.dense("bert-regression"), tmp_path / "artifact", [PhaseRecord("Test")])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "artifact")
    inputs = tiny.batch("bert-regression")
    with torch.no_grad():
        output = loaded(**{**inputs, "labels": inputs["labels"].float()})
    assert float(output.loss) == pytest.approx(float((output.logits[:, 0] - inputs["labels"]).square().mean()))


def test_dense_timm_artifact_loads_with_timm(tmp_path):
    model = tiny.dense("timm_vit")
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'artifact'}", pretrained=True).eval()
    inputs = tiny.batch("timm_vit")
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))


def test_a_chunked_bert_is_refused():
    config = transformers.BertConfig(vocab_size=40, chunk_size_feed_forward=4, **tiny.SHAPE)
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(ConfigError, match=r"chunk_size_feed_forward=4 in bert.encoder.layer.0: must be 0"):
        convert_to_moe_(model, ExpertsConfig(8))


def test_gpt2_keeps_its_dropout():
    model = tiny.routed("gpt2")
    model.train()
    for name, layer in moe_layers(model).items():
        assert name.startswith("transformer.h.")
        assert layer.output_dropout.p == model.config.resid_pdrop == 0.1
        layer.output_dropout.p = 1.0
        assert not layer(torch.randn(2, 3, 24)).any()


def test_a_decoders_classifier_reads_the_last_token_whatever_padding_is():
    model, inputs = tiny.dense("gpt2"), tiny.batch("gpt2")
    expected = tiny.logits(model, inputs)
    padding = inputs["attention_mask"] == 0
    assert torch.equal(
        tiny.logits(model, {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 9)}), expected
    )
    last = inputs["attention_mask"].sum(dim=1) - 1
    every = model.score(model.transformer(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0])
    torch.testing.assert_close(expected, every[range(3), last])


def test_token_types_reach_bert_only():
    """Where tokenizers give them, other families take them for something else, or not at all."""
    inputs = tiny.batch("gpt2")
    types = {**inputs, "token_type_ids": (inputs["input_ids"] % 2).clamp(max=1)}
    for kind in ("roberta", "distilbert", "gpt2", "llama"):
        model = tiny.dense(kind)
        assert torch.equal(tiny.logits(model, types), tiny.logits(model, inputs))
    model = tiny.dense("bert")
    assert not torch.allclose(tiny.logits(model, types), tiny.logits(model, inputs))


FIRST = [kind for kind in tiny.TASKS if tiny.is_of_texts(kind) and kind in tiny.CONFIGS]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FIRST)
@torch.no_grad()
def test_each_attention_implementation(kind, implementation):
    model, inputs = tiny.dense(kind), tiny.batch(kind)
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        pytest.skip("transformers has none for it")
    expected = tiny.logits_of_tokens(model, inputs)
    convert_to_moe_(model, ExpertsConfig(8))
    torch.testing.assert_close(tiny.logits_of_tokens(model, inputs), expected, rtol=1e-4, atol=1e-4)
