"""In a gated FFN, ``down(act(gate(x)) * up(x))``, the gate decides whether a neuron fires; everything goes by it."""

import copy

import pytest
import tiny
import torch

from d2dmoe_pl.data import Classification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.routers import gram_matrices, output_norms
from d2dmoe_pl.moebert.conversion import convert_to_moebert_
from d2dmoe_pl.moebert.importance import Importance
from d2dmoe_pl.phases import ExpertClustering, ImportanceScoring, SparsityEnforcement
from d2dmoe_pl.phases._preflight import preflight

KINDS = ["llama", "llama-bias", "gemma", "gemma-2", "gemma-3"]


def inputs_of(model, run):
    """What each FFN of ``model`` is given in ``run``, ``(B, L, d_model)`` by its name."""
    seen, handles = {}, []
    for ffn in select_ffns(model):
        hook = lambda module, args, name=ffn.name: seen.update({name: args[0]})  # noqa: E731
        handles.append(model.get_submodule(ffn.name).register_forward_pre_hook(hook))
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_taps_see_the_gate(kind):
    model, batch, seen = tiny.dense(kind, "silu"), tiny.batch(kind), {}
    with watched_activations(select_ffns(model), lambda name, pre, post: seen.update({name: (pre, post)})):
        tokens = inputs_of(model, lambda: tiny.logits(model, batch))
    for ffn in select_ffns(model):
        pre, post = seen[ffn.name]
        assert torch.equal(pre, ffn.gate_proj(tokens[ffn.name]))
        assert torch.equal(post, torch.nn.functional.silu(pre))
        assert torch.equal(ffn.input_weight, ffn.gate_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_relu_goes_on_the_gate(kind):
    model, batch = tiny.dense(kind, "relu"), tiny.batch(kind)
    tokens = inputs_of(model, lambda: tiny.logits(model, batch))
    for ffn in select_ffns(model):
        x = tokens[ffn.name]
        expected = ffn.down(ffn.gate_proj(x).relu() * ffn.up(x))
        torch.testing.assert_close(model.get_submodule(ffn.name)(x), expected)


def penalty_of(phase, model, batch):
    """What a training step adds to the loss, less ``alpha``."""
    phase.model, phase.task, phase._ffns = model, Classification(tiny.LABELS), select_ffns(model)
    phase.progress = lambda: 0.0
    logged = {}
    phase.log_dict = lambda values, **kwargs: logged.update(values)
    phase.log = lambda *args, **kwargs: None
    phase.training_step(batch, 0)
    return logged["train/penalty"]


@pytest.mark.parametrize(("activation", "displacement"), [("relu", None), ("silu", -1.5)])
def test_the_penalty_is_on_the_gates_activation(activation, displacement):
    model, batch = tiny.dense("llama", activation), tiny.batch("llama")
    got = penalty_of(SparsityEnforcement("l1", displacement=displacement, init_from="-"), model, batch)
    tokens = inputs_of(model, lambda: tiny.logits(model, batch))
    real = batch["attention_mask"] == 1
    penalties = []
    for ffn in select_ffns(model):
        pre = ffn.gate_proj(tokens[ffn.name])[real]
        watched = pre.relu() if displacement is None else (pre + 1.5).clamp(min=0)
        penalties.append(watched.abs().sum(dim=-1).mean())
    torch.testing.assert_close(got, torch.stack(penalties).mean())


@pytest.mark.parametrize("split", ["parameter", "activation"])
def test_clusters_are_of_neurons_whose_gates_are_alike(trainer, tmp_path, split):
    """Four groups of equal gate rows, whatever the other projections."""
    groups = torch.randperm(tiny.WIDTH) % 4
    model = tiny.dense("llama")
    with torch.no_grad():
        for ffn in select_ffns(model):
            ffn.gate_proj.weight.copy_(torch.randn(4, ffn.d_model)[groups])
    phase = ExpertClustering(4, split, num_samples=32, init_from="-")
    phase.configure_model = lambda: None
    phase.model, phase.metrics = model, torch.nn.ModuleDict()
    trainer(limit_train_batches=1.0, limit_val_batches=0).fit(phase, datamodule=tiny.TextData(8))
    for layer in moe_layers(model).values():
        rows = layer.experts.gate_weight  # (E, s, d)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert not torch.equal(layer.experts.up_weight, layer.experts.up_weight[:, :1].expand_as(rows))


def test_router_targets_are_the_norms_of_gated_experts():
    dense = tiny.dense("llama-bias")
    model = copy.deepcopy(dense)
    convert_to_moe_(model, ExpertsConfig(4))
    ffn, tokens = select_ffns(dense)[0], torch.randn(5, 24)
    hidden = ffn.activation(ffn.gate_proj(tokens)) * ffn.up(tokens)  # (N, d_ff)
    outputs = [hidden[:, part] @ ffn.down.weight[:, part].t() for part in torch.arange(tiny.WIDTH).split(12)]
    expected = torch.stack(outputs, dim=1).norm(dim=-1)  # (N, E)
    experts = moe_layers(model)[ffn.name].experts
    torch.testing.assert_close(output_norms(experts.hidden(tokens), gram_matrices(experts.down_weight)), expected)


def test_importance_is_not_defined_for_them():
    message = "model.layers.0.mlp: a gated FFN; importance scores are defined for FFNs without a gate"
    with pytest.raises(ConfigError, match=message):
        Importance(select_ffns(tiny.dense("llama")), torch.device("cpu"))
    with pytest.raises(ConfigError, match=message):
        preflight([ImportanceScoring(source=tiny.SOURCES["llama"]())])


def test_moebert_is_not_made_of_them():
    message = (
        r"model.layers.0.mlp: MoEBERT's experts replace an FFN without a gate and the LayerNorm after its residual"
    )
    with pytest.raises(ConfigError, match=message):
        convert_to_moebert_(tiny.dense("llama"), tiny.MOEBERT)


def test_exact_zeros_are_asked_for_on_the_gate():
    source = tiny.SOURCES["gemma-causal-language-modeling"]()
    with pytest.raises(ConfigError, match=r"displacement=None: allowed only on ReLU, but model.layers.0.mlp has GELUT"):
        preflight([SparsityEnforcement("l1", source=source)])
