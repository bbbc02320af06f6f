"""Budgets of a rule that runs whole numbers of experts: nothing is promised that lies between two of them."""

import pytest
import tiny
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl import load_model, save_artifact, set_budget_
from d2dmoe_pl.artifact import PhaseRecord
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import Digits
from d2dmoe_pl.phases import BudgetCalibration

BUDGETS = [0.8, 0.7, 0.6, 0.5, 0.4]


def test_none_costs_more_than_was_asked_for(trainer, tmp_path):
    model = tiny.route_(digits_source().build(DIGIT_LABELS), rule="topk")
    save_artifact(model, tmp_path / "routed", [PhaseRecord("ExpertSelection")])
    sweep = TauSweep(budgets=BUDGETS)
    run = trainer(callbacks=[SaveArtifact(), sweep], limit_val_batches=1.0)
    phase = BudgetCalibration(ffn_flops=0.7, num_samples=50, num_scored_points=5, init_from=str(tmp_path / "routed"))
    run.fit(phase, datamodule=Digits(16))
    model = load_model(f"{run.log_dir}/artifact")
    for budget, row in zip(BUDGETS, sweep.rows["validation"], strict=True):
        promised = set_budget_(model, ffn_flops=budget)
        assert row.ffn_flops_percent == pytest.approx(100 * promised.ffn_flops)
        assert budget - 0.13 < promised.ffn_flops <= budget  # a step of one of two layers with eight experts
