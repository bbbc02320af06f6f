"""The phase that fits cutoffs: fewer FLOPs for the same experts, dense at the end, few samples."""

from itertools import pairwise

import pytest
import tiny
import torch

from d2dmoe_pl import load_model, set_tau_
from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import budget_path, set_budget_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import BudgetCalibration, CutoffFitting
from d2dmoe_pl.phases._preflight import preflight


@pytest.fixture
def routed(tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    return str(tmp_path / "routed")


@torch.no_grad()
def test_the_same_experts_cost_less_and_the_sweep_sees_it(trainer, routed):
    data, rows = tiny.TextData(8), {}
    for hidden in (1.0, 0.4):
        sweep = TauSweep([0.5, 1.0])
        phase = CutoffFitting(inputs=hidden, hidden=hidden, init_from=routed)
        run = trainer(callbacks=[SaveArtifact(), sweep])
        run.fit(phase, datamodule=data)
        rows[hidden] = sweep.rows["validation"]
    (without, full), (low, full_too) = rows[1.0], rows[0.4]
    assert low.ffn_flops_percent < 0.75 * without.ffn_flops_percent
    assert full_too.ffn_flops_percent == pytest.approx(full.ffn_flops_percent)
    assert full_too.loss == pytest.approx(full.loss, rel=1e-5)
    assert read_artifact(f"{run.log_dir}/artifact").stage == "routed"
    fitted, before = load_model(f"{run.log_dir}/artifact"), load_model(routed)
    batch = next(iter(data.val_dataloader()))
    for model in (fitted, before):
        set_tau_(model, 1.0)
    assert torch.equal(tiny.logits(fitted, batch), tiny.logits(before, batch))


def test_no_more_samples_are_run_than_asked_for(trainer, routed, monkeypatch):
    seen = []

    def fit(model, config, *, run, reduce):
        monkeypatch.setattr(CutoffFitting, "run_layers", lambda phase, batch: seen.append(len(batch["labels"])))
        run()

    monkeypatch.setattr("d2dmoe_pl.phases.cutoff_fitting.fit_cutoffs_", fit)
    trainer(limit_val_batches=0).fit(CutoffFitting(num_tokens=60, init_from=routed), datamodule=tiny.TextData(8))
    assert seen == [8, 8]


@pytest.mark.parametrize("estimate", ["measured", "gradients"])
def test_budgets_count_what_is_left_out(trainer, routed, estimate):
    run = trainer(callbacks=[SaveArtifact()])
    run.fit(CutoffFitting(inputs=0.5, hidden=0.3, init_from=routed), datamodule=tiny.TextData(8))
    sweep = TauSweep(budgets=[0.4])
    phase = BudgetCalibration(
        0.4, num_samples=30, num_scored_points=1000, estimate=estimate, init_from=f"{run.log_dir}/artifact"
    )
    trainer(callbacks=[sweep], limit_val_batches=1.0).fit(phase, datamodule=tiny.TextData(8))
    costs = [point.ffn_flops for point in budget_path(phase.model).points]
    assert max(before - after for before, after in pairwise(costs)) < 0.2
    (row,) = sweep.rows["validation"]
    assert row.ffn_flops_percent == pytest.approx(40, abs=4)
    assert set_budget_(phase.model, ffn_flops=0.4).ffn_flops == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("given", [{}, {"inputs": 1.0}])
@torch.no_grad()
def test_shares_that_are_not_given_are_each_layers_own(trainer, routed, given):
    run = trainer(callbacks=[SaveArtifact()])
    run.fit(CutoffFitting(ffn_flops=0.3, num_tokens=200, init_from=routed, **given), datamodule=tiny.TextData(8))
    fitted = load_model(f"{run.log_dir}/artifact")
    found = [layer.cutoffs.config for layer in moe_layers(fitted).values()]
    assert found[0] != found[1]
    assert all(config.hidden < 1 and config.gate_proj == 1 for config in found)
    assert not given or {config.inputs for config in found} == {1.0}
    restored = CutoffFitting(ffn_flops=0.3, init_from=routed, **given)
    run.save_checkpoint(f"{run.log_dir}/last.ckpt")
    trainer().fit(restored, datamodule=tiny.TextData(8), ckpt_path=f"{run.log_dir}/last.ckpt")
    assert [layer.cutoffs.config for layer in moe_layers(restored.model).values()] == found
    batch = tiny.batch("bert")
    assert torch.equal(tiny.logits(restored.model.eval(), batch), tiny.logits(fitted.eval(), batch))


def test_gates_are_looked_for_with_the_others_alone():
    assert CutoffFitting(0.7, 0.4).search.start == CutoffConfig(0.7, 0.4)
    assert CutoffFitting(0.7, 0.4).search.free(is_gated=True) == []
    assert CutoffFitting(0.7).search.free(is_gated=True) == ["hidden", "gate_proj"]


def test_refused_before_anything_runs(artifact):
    with pytest.raises(ConfigError, match="is the work of ExpertClustering, at stage 'experts'"):
        preflight([CutoffFitting(init_from=artifact("experts"))])
    with pytest.raises(ConfigError, match="num_tokens=0: must be positive"):
        CutoffFitting(num_tokens=0)
    with pytest.raises(ConfigError, match=r"inputs=2: must lie in \(0, 1\]"):
        CutoffFitting(inputs=2)
    with pytest.raises(ConfigError, match=r"ffn_flops=1: must lie in \(0, 1\), a share of the dense FFNs' FLOPs"):
        CutoffFitting(ffn_flops=1)
