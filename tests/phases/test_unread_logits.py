"""Phases that read no logits have a vocabulary's head look at one position, and find what they found with all."""

from functools import partial

import lightning as L
import pytest
import tiny
import torch
from digits_models import state

from d2dmoe_pl.adapters import Adapter, adapter_for
from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.moe.budgets.budget_path import budget_path
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    CutoffFitting,
    ExpertClustering,
    RouterRegression,
    StandInFitting,
)

KIND = "gpt2-causal-language-modeling"
ADAM = partial(torch.optim.Adam, lr=1e-2)
PHASES = {
    "clustering": ("dense", partial(ExpertClustering, 8, num_samples=16)),
    "attention": ("dense", partial(AttentionDistillation, optimizer=ADAM)),
    "routers": ("experts", partial(RouterRegression, 8, optimizer=ADAM)),
    "cutoffs": ("routed", partial(CutoffFitting, num_tokens=300)),
    "stand-ins": ("routed", partial(StandInFitting, rank=4, num_tokens=300)),
    "budgets": ("routed", partial(BudgetCalibration, num_samples=16, num_scored_points=2, estimate="gradients")),
}


class Positions(L.Callback):
    """How many positions the head is given, call by call, until something is validated."""

    def on_train_start(self, trainer, phase):
        self.seen = []
        for model in (phase.model, *([phase._original.model] if hasattr(phase, "_original") else [])):
            head = adapter_for(model).vocabulary_head(model)
            head.register_forward_hook(lambda module, args, output: self.seen.append(output.shape[1]))


def saved(stage, folder):
    if stage == "routed":
        model = tiny.routed(KIND)
    else:
        model = tiny.dense(KIND)
        if stage == "experts":
            convert_to_moe_(model, ExpertsConfig(8, 4))
    name = {"dense": "FineTuning", "experts": "ExpertClustering", "routed": "RouterRegression"}[stage]
    save_artifact(model, folder, [PhaseRecord(name)])
    return str(folder)


@pytest.mark.parametrize("which", PHASES)
def test_the_same_to_the_bit_from_one_position(trainer, tmp_path, make_data, monkeypatch, which):
    stage, make = PHASES[which]
    start, found, positions = saved(stage, tmp_path / stage), [], []
    for runs in (None, Adapter.run_layers):  # the second computes all logits
        if runs is not None:
            monkeypatch.setattr("d2dmoe_pl.adapters._hugging_face.HuggingFaceAdapter.run_layers", runs)
        torch.manual_seed(0)
        phase, head = make(init_from=start), Positions()
        run = trainer(callbacks=[head], limit_val_batches=0)
        run.fit(phase, datamodule=make_data(KIND))
        found.append((state(phase.model), budget_path(phase.model)))
        positions.append(head.seen)
    (one, path), (other, other_path) = found
    assert path == other_path
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert len(positions[0]) == len(positions[1]) > 0
    assert set(positions[1]) == {12}
    # a gradient and scores are of logits
    assert set(positions[0]) == ({1, 12} if which in ("budgets", "cutoffs") else {1})
