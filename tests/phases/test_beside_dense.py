"""What is kept of batches that a model runs on again and again, and that it makes no difference."""

import weakref

import pytest
import tiny
import torch
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.data import Digits
from d2dmoe_pl.phases import BudgetCalibration, _beside_dense
from d2dmoe_pl.phases._beside_dense import BesideDense
from d2dmoe_pl.phases._held_out import held_out


@pytest.mark.parametrize(
    ("kind", "estimate"),
    [
        ("timm_vit", "gradients"),
        ("gpt2-causal-language-modeling", "gradients"),
        ("gpt2-causal-language-modeling", "measured"),
        ("gemma-2-causal-language-modeling", "measured"),
        ("bert-masked-language-modeling", "measured"),
    ],
)
def test_the_logits_of_a_few_batches_are_held_at_once(trainer, tmp_path, make_data, kind, estimate, monkeypatch):
    """However many there are: the dense ones, those beside them, and those that are about to go."""
    model = tiny.route_(digits_source().build(DIGIT_LABELS)) if kind == "timm_vit" else tiny.routed(kind)
    save_artifact(model, tmp_path / "routed", [PhaseRecord("RouterRegression")])
    alive, most, logits = weakref.WeakSet(), [], BudgetCalibration.logits

    def counted(phase, batch):
        result = logits(phase, batch)
        if phase.trainer.training:  # not in Lightning's validation
            alive.add(result)
            most.append(len(alive))
        return result

    monkeypatch.setattr(BudgetCalibration, "logits", counted)
    monkeypatch.setattr(_beside_dense, "LEFT_VALUES", 0)
    data = Digits(16) if kind == "timm_vit" else make_data(kind)
    phase = BudgetCalibration(
        num_samples=64, num_scored_points=4, keep=0.3, estimate=estimate, init_from=str(tmp_path / "routed")
    )
    trainer(limit_val_batches=1.0).fit(phase, datamodule=data)
    assert len(held_out(phase, 2000)) > 6
    assert max(most) <= 3


@pytest.mark.parametrize("kind", ["gpt2-causal-language-modeling", "gemma-2-causal-language-modeling"])
def test_logits_are_the_same_to_the_bit_when_computed_anew(trainer, tmp_path, make_data, kind, monkeypatch):
    save_artifact(tiny.routed(kind), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    phase = BudgetCalibration(
        num_samples=16, num_scored_points=2, estimate="gradients", init_from=str(tmp_path / "routed")
    )
    trainer(limit_val_batches=1.0).fit(phase, datamodule=make_data(kind))
    batches = held_out(phase, 40)
    kept, anew = (BesideDense(phase, batches, keeps_vocabulary=keeps) for keeps in (True, False))
    monkeypatch.setattr(_beside_dense, "LEFT_VALUES", 3 * batches[0]["input_ids"].numel() * 24)  # of about three
    for taus in ([1.0, 0.5], [0.5, 0.5], [0.5, 0.1]):
        for number in range(len(batches)):
            with torch.no_grad():
                one, other = kept.run(number, taus), anew.run(number, taus)
            assert one[0].equal(other[0])
            assert one[1].equal(other[1])
            kept.leave(number)
    assert len(anew._head_inputs) == len(batches) > len(kept._head_inputs) > 1
    assert not anew._logits
    assert not kept._logits
