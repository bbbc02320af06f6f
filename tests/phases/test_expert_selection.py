"""MoEfication's choice of experts: what is trained, what is left alone, what is refused."""

from functools import partial

import pytest
import tiny
import torch
from torch.nn import functional as F

from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import ExpertSelection
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.structure import describe


@pytest.fixture
def experts(tmp_path):
    """The artifact of a ReLU BERT with 8 experts a layer."""
    model = tiny.dense("bert")
    convert_to_moe_(model, ExpertsConfig(8))
    save_artifact(model, tmp_path / "experts", [PhaseRecord("ExpertClustering")])
    return str(tmp_path / "experts")


def fit(trainer, phase, **kwargs):
    run = trainer(limit_train_batches=1.0, callbacks=[SaveArtifact()], **kwargs)
    run.fit(phase, datamodule=tiny.TextData(8))
    return run


@pytest.mark.parametrize("router", ["mlp", "regression"])
def test_only_routers_change_and_they_get_better(trainer, experts, router):
    phase = ExpertSelection(3, router, init_from=experts, optimizer=partial(torch.optim.Adam, lr=1e-2))
    losses, step = [], phase.training_step
    phase.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
    fit(trainer, phase, max_epochs=12)
    before, after = load_model(experts).state_dict(), phase.model.state_dict()
    assert {name for name in after if name not in before} == {name for name in after if ".router." in name}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize("router", ["similarity", "ground_truth", "random"])
def test_without_training_no_batch_is_run(trainer, experts, router, tmp_path):
    phase = ExpertSelection(3, router, init_from=experts)
    phase.training_step = lambda batch, batch_idx: pytest.fail("nothing is to be trained")
    run = fit(trainer, phase, max_epochs=3)
    assert run.global_step == 0
    model = load_model(tmp_path / "run" / "artifact")
    assert {made["router"]["kind"] for made in describe(model).values()} == {router}


@pytest.mark.parametrize("router", ["mlp", "similarity", "ground_truth", "random", "regression"])
def test_leaves_a_model_in_which_every_token_runs_k(trainer, experts, router, tmp_path):
    fit(trainer, ExpertSelection(3, router, 8, init_from=experts))
    model = load_model(tmp_path / "run" / "artifact")
    seen = []
    for layer in moe_layers(model).values():
        layer.watch(lambda mask: seen.append(mask.sum(dim=1)))
    tiny.logits(model, tiny.batch("bert"))
    assert len(seen) == 2
    assert all((counts == 3).all() for counts in seen)


def test_the_loss_is_cross_entropy_against_the_scaled_sums_of_activations(trainer, experts):
    phase = ExpertSelection(3, init_from=experts)
    fit(trainer, phase)
    layers, expected = moe_layers(phase.model), {}
    for layer in layers.values():
        layer.gate = None

    def naive(name, layer):
        def hook(module, args, output):
            tokens = args[0].flatten(0, 1)[mask]
            hidden = layer.experts.hidden(tokens)
            sums = torch.tensor([[sum(max(h, 0.0) for h in expert) for expert in token] for token in hidden.tolist()])
            logits = layer.router.down(layer.router.up(tokens).tanh())
            expected[name] = F.binary_cross_entropy_with_logits(logits, sums / sums.max())

        layer.register_forward_hook(hook)

    for name, layer in layers.items():
        naive(name, layer)
    batch = tiny.batch("bert")
    mask = batch["attention_mask"].flatten().bool()
    with torch.no_grad():
        tiny.logits(phase.model, batch)
    losses = phase._router_losses(batch)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
        assert losses[name].requires_grad


def test_evaluates_its_own_artifact_at_another_k(trainer, experts, tmp_path):
    fit(trainer, ExpertSelection(3, init_from=experts))
    inputs = tiny.batch("bert")
    dense = tiny.logits(load_model(experts), inputs)
    for k, same in ((1, False), (8, True)):
        phase = ExpertSelection(k, init_from=str(tmp_path / "run" / "artifact"))
        trainer(logger=False).test(phase, datamodule=tiny.TextData(8), verbose=False)
        assert torch.allclose(tiny.logits(phase.model, inputs), dense, rtol=1e-5, atol=1e-5) == same


def test_settings_that_cannot_be(experts):
    with pytest.raises(ConfigError, match="k=0: must be at least 1, the number of experts that each token runs"):
        ExpertSelection(0)
    with pytest.raises(ConfigError, match="router='oracle': allowed are ground_truth, mlp, random, regression, simil"):
        ExpertSelection(1, "oracle")
    with pytest.raises(ConfigError, match=r"k=9: must be at most the number of experts, 8 in bert.encoder.layer.0"):
        preflight([ExpertSelection(9, init_from=experts)])
