"""The phase that fits stand-ins: nearer to dense, from few samples, the same from one process as from two."""

import pytest
import tiny
import torch
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl import load_model, set_tau_
from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import dense_ffn_flops
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import RecoveryTuning, StandInFitting
from d2dmoe_pl.phases._preflight import preflight


@pytest.fixture(params=["bert", "timm_vit"])
def routed(request, tmp_path, digits):
    """The artifact of a routed model, and data for it."""
    model = tiny.routed("bert") if request.param == "bert" else None
    if model is None:
        model = tiny.route_(digits_source().build(DIGIT_LABELS))
    save_artifact(model, tmp_path / "routed", [PhaseRecord("RouterRegression")])
    return str(tmp_path / "routed"), tiny.TextData(8) if request.param == "bert" else digits


def divergence(model, batches, tau):
    set_tau_(model, 1.0)
    dense = [tiny.logits(model, batch) for batch in batches]
    set_tau_(model, tau)
    return sum(
        (tiny.logits(model, batch) - full).square().mean().item() for batch, full in zip(batches, dense, strict=True)
    )


@torch.no_grad()
def test_the_model_is_nearer_to_dense_and_the_sweep_sees_it(trainer, routed):
    path, data = routed
    sweep = TauSweep([0.0, 1.0])
    phase = StandInFitting(rank=8, num_tokens=400, init_from=path)
    run = trainer(callbacks=[SaveArtifact(), sweep])
    run.fit(phase, datamodule=data)
    assert run.global_step == 0
    loader = data.val_dataloader()
    batches = list(loader)
    fitted, before = load_model(f"{run.log_dir}/artifact"), load_model(path)
    assert divergence(fitted, batches, 0.2) < divergence(before, batches, 0.2)
    assert read_artifact(f"{run.log_dir}/artifact").stage == "routed"
    low, full = sweep.rows["validation"]
    layer = next(iter(moe_layers(fitted).values()))
    assert layer.stand_in.flops() > 0
    beside = 100 * (layer.router.flops() + layer.stand_in.flops()) / dense_ffn_flops(layer.sizes)
    assert low.ffn_flops_percent == pytest.approx(low.experts_percent + beside)
    assert full.ffn_flops_percent == 100
    set_tau_(fitted, 0.0)
    metrics = data.task.metrics()
    for batch in batches[:2]:  # as many as the trainer takes
        metrics.update(tiny.logits(fitted, batch), batch)
    assert low.loss == pytest.approx(float(metrics.compute()["loss"]), rel=1e-4)


def test_no_more_samples_are_run_than_asked_for(trainer, routed, monkeypatch):
    path, data = routed
    seen = []
    phase = StandInFitting(rank=4, num_tokens=60, init_from=path)
    monkeypatch.setattr(
        "d2dmoe_pl.phases.stand_in_fitting.fit_stand_ins_",
        lambda *args, batch, **kwargs: seen.append(len(batch["labels"])),
    )
    trainer().fit(phase, datamodule=data)
    assert seen == [16]  # two batches of 8 texts of 5 tokens on average; one of 16 pictures of 5


def test_recovery_trains_stand_ins(trainer, tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    run = trainer(callbacks=[SaveArtifact()])
    run.fit(StandInFitting(rank=4, init_from=str(tmp_path / "routed")), datamodule=tiny.TextData(8))
    fitted = load_model(tmp_path / "run" / "artifact")
    phase = RecoveryTuning(0.0, 0.5, num_held_out=0, init_from=str(tmp_path / "run" / "artifact"))
    trainer(max_epochs=2).fit(phase, datamodule=tiny.TextData(8))
    for before, after in zip(moe_layers(fitted).values(), moe_layers(phase.model).values(), strict=True):
        assert not torch.equal(before.stand_in.down, after.stand_in.down)


def test_refused_before_anything_runs(artifact):
    message = "rank=300: must be at most 64, the width of blocks.0.mlp"
    with pytest.raises(ConfigError) as error:
        preflight([StandInFitting(rank=300, init_from=artifact("routed"))])
    assert str(error.value).startswith(message.partition(" at most")[0])
    with pytest.raises(ConfigError, match="is the work of ExpertClustering, at stage 'experts'"):
        preflight([StandInFitting(init_from=artifact("experts"))])
    with pytest.raises(ConfigError, match="num_tokens=0: must be positive"):
        StandInFitting(num_tokens=0)
