"""MLPs that learn to be attention projections: from what, what they leave alone, and what may follow."""

from functools import partial

import pytest
import tiny
import torch
from torch.nn import functional as F

from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.experts.activation_watching import watched_activations
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.projections import projection_mlps
from d2dmoe_pl.phases import (
    AttentionDistillation,
    ExpertClustering,
    ImportanceScoring,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
)
from d2dmoe_pl.phases._preflight import preflight

FAST = partial(torch.optim.Adam, lr=1e-2)


def saved(model, folder, phase="FineTuning"):
    save_artifact(model, folder, [PhaseRecord(phase)])
    return str(folder)


@pytest.fixture
def dense(tmp_path):
    """The artifact of a dense BERT."""
    return saved(tiny.dense("bert"), tmp_path / "dense")


def fit(trainer, phase, **kwargs):
    """The phase, and everything that it logged at each step."""
    logged = []
    phase.log_dict = lambda values, **kwargs: logged.append(
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
    )
    trainer(limit_train_batches=1.0, limit_val_batches=0, callbacks=[SaveArtifact()], **kwargs).fit(
        phase, datamodule=tiny.TextData(8)
    )
    steps = [values for values in logged if "train/loss" in values]
    return steps, [values for values in logged if "train/penalty" in values]


def test_errors_are_those_of_each_projection_on_the_original_models_tokens(trainer, dense):
    phase = AttentionDistillation(init_from=dense, optimizer=partial(torch.optim.SGD, lr=0.0))
    fit(trainer, phase)
    original, inputs = load_model(dense), tiny.batch("bert")
    errors, relative, _ = phase._imitate(inputs)
    real = inputs["attention_mask"].bool()
    assert len(errors) == 8
    for name, error in errors.items():
        seen = []
        handle = original.get_submodule(name).register_forward_hook(
            lambda m, args, y, seen=seen: seen.extend([*args, y])
        )
        tiny.logits(original, inputs)
        handle.remove()
        x, target = (values[real] for values in seen)  # (N, d)
        got = projection_mlps(phase.model)[name](x)
        torch.testing.assert_close(error, F.mse_loss(got, target))
        torch.testing.assert_close(relative[name], (got - target).norm() / target.norm())


@pytest.mark.parametrize("kind", ["bert", "timm_vit", "gpt2"])
def test_each_output_is_learnt_in_its_place(kind):
    """Wide MLPs that are their projection exactly have no error, fused ones too."""
    phase = AttentionDistillation(width=48, init_from="-")
    model, inputs = tiny.dense(kind), tiny.batch(kind)
    expected = tiny.logits(model, inputs)
    phase.transform_(model)
    phase.model = model
    phase.on_fit_start()
    with torch.no_grad():
        for projection in phase._projections:
            mlp = phase._mlps[projection.name].mlp
            eye = torch.eye(projection.d_in)
            mlp.up.weight.zero_()[: 2 * projection.d_in].copy_(torch.cat([eye, -eye]))  # x = relu(x) - relu(-x)
            mlp.up.bias.zero_()
            weight = projection.weight
            mlp.down.weight.zero_()[:, : 2 * projection.d_in].copy_(torch.cat([weight, -weight], dim=1))
            mlp.down.bias.copy_(projection.bias if projection.bias is not None else torch.zeros(projection.d_out))
    _, relative, _ = phase._imitate(inputs)
    assert len(relative) == 8
    assert max(relative.values()) < 1e-5
    torch.testing.assert_close(tiny.logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_mlps_learn_and_nothing_else_changes(trainer, dense, tmp_path):
    phase = AttentionDistillation(init_from=dense, optimizer=FAST, alpha=0.0)
    steps, _ = fit(trainer, phase, max_epochs=25)
    assert steps[-1]["train/relative_error"] < 0.6 * steps[0]["train/relative_error"]
    artifact = read_artifact(tmp_path / "run" / "artifact")
    assert artifact.stage == "dense"
    assert len(artifact.projections) == 8
    before, after = load_model(dense).state_dict(), load_model(artifact.path).state_dict()
    new = {key for key in after if ".mlp." in key}
    assert len(new) == 8 * 4
    assert {key.rpartition(".")[0] for key in before.keys() - after.keys()} == set(artifact.projections)
    for key in after.keys() - new:
        assert torch.equal(after[key], before[key])
    assert not any("original" in key for key in phase.state_dict())


def test_the_original_is_the_model_that_came_and_takes_no_memory_of_its_own(dense):
    phase, model = AttentionDistillation(init_from=dense), load_model(dense)
    inputs = tiny.batch("bert")
    expected = tiny.logits(model, inputs)
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    phase.transform_(model)
    original = phase._original.model
    assert torch.equal(tiny.logits(original, inputs), expected)
    assert {id(tensor) for tensor in (*original.parameters(), *original.buffers())} == tensors


def test_the_penalty_makes_hidden_activations_sparse(trainer, dense, tmp_path):
    zeros = []
    for alpha in (0.0, 0.3):
        phase = AttentionDistillation(init_from=dense, optimizer=FAST, alpha=alpha, schedule="constant")
        _, parts = fit(trainer, phase, max_epochs=10)
        assert {values["train/alpha"] for values in parts} == {alpha}
        seen = []
        model = phase.model.eval()
        ffns = [ffn for ffn in select_ffns(model) if ffn.is_projection]
        with (
            watched_activations(ffns, lambda name, pre, post, seen=seen: seen.append((post == 0).float().mean())),
            torch.no_grad(),
        ):
            tiny.logits(model, tiny.batch("bert"))
        zeros.append(float(torch.stack(seen).mean()))
    assert zeros[1] > zeros[0] + 0.2


def test_the_phases_after_it_take_the_mlps_for_ffns(trainer, dense, tmp_path):
    folder = tmp_path / "run" / "artifact"
    fit(trainer, AttentionDistillation(init_from=dense, multiple_of=4))
    for phase in (
        partial(SparsityEnforcement),
        partial(ExpertClustering, 8, num_projection_experts=4),
        partial(RouterRegression, 8),
        partial(RecoveryTuning),
    ):
        fit(trainer, phase(init_from=str(folder)))
    model = load_model(folder)
    layers = moe_layers(model)
    assert [layer.experts.num_experts for layer in layers.values()] == [4, 4, 4, 4, 8] * 2
    assert all(layer.router is not None and layer.gate is not None for layer in layers.values())
    assert read_artifact(folder).stage == "routed"


@pytest.mark.parametrize(("convert", "ffns", "projections"), [("all", 2, 8), ("ffns", 2, 0), ("projections", 0, 8)])
def test_clustering_can_be_of_one_kind_alone(trainer, tmp_path, convert, ffns, projections):
    start = saved(tiny.with_projections("bert"), tmp_path / "mlps", "AttentionDistillation")
    phase = ExpertClustering(8, num_projection_experts=4, convert=convert, init_from=start)
    preflight([phase, RouterRegression(8)])
    fit(trainer, phase)
    model = load_model(tmp_path / "run" / "artifact")
    names = [name for name, layer in moe_layers(model).items() if layer.experts.num_experts == 4]
    assert (len(moe_layers(model)) - len(names), len(names)) == (ffns, projections)
    inputs = tiny.batch("bert")
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(load_model(start), inputs), rtol=1e-5, atol=1e-5)


def test_some_projections_alone(dense):
    phase, model = AttentionDistillation(["query", "key"], init_from=dense), load_model(dense)
    phase.transform_(model)
    assert {name.rpartition(".")[2] for name in projection_mlps(model)} == {"query", "key"}


def test_a_whole_chain_is_checked_on_shapes(dense):
    preflight(
        [
            AttentionDistillation(multiple_of=4, init_from=dense),
            SparsityEnforcement(),
            ExpertClustering(8, num_projection_experts=4),
            RouterRegression(8),
            RecoveryTuning(),
        ]
    )
    with pytest.raises(ConfigError, match="num_experts=8: must divide the FFN width, which is 12 in bert"):
        preflight([AttentionDistillation(multiple_of=4, init_from=dense), ExpertClustering(8)])
    with pytest.raises(ConfigError, match="multiple_of=16: must be at most 12"):
        preflight([AttentionDistillation(multiple_of=16, init_from=dense)])
    again = [AttentionDistillation(init_from=dense), AttentionDistillation()]
    with pytest.raises(ConfigError, match="no linear attention projection found that the filter admits"):
        preflight(again)


def test_importance_is_not_defined_for_what_runs_side_by_side(tmp_path):
    start = saved(tiny.with_projections("bert"), tmp_path / "mlps", "AttentionDistillation")
    with pytest.raises(ConfigError, match=r"query.mlp: stands in the place of an attention projection;"):
        preflight([ImportanceScoring(init_from=start)])


def test_it_starts_from_a_dense_model(tmp_path):
    routed = saved(tiny.routed("bert"), tmp_path / "routed", "RouterRegression")
    with pytest.raises(ConfigError, match="at stage 'routed'; AttentionDistillation starts from stage 'dense'"):
        preflight([AttentionDistillation(init_from=routed)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projections": []}, r"projections=\[\]: must be at least one of query, key, value, output"),
        ({"projections": ["gate"]}, r"projections=\['gate'\]: must be at least one of query, key, value, output"),
        ({"alpha": -1}, "alpha=-1: must not be negative"),
        ({"width": 0}, "width=0: an MLP needs at least one hidden neuron"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AttentionDistillation(**arguments)
