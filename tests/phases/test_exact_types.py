"""In a narrow type, what a model has in float32 in any stays so: in training, in evaluation, in what is learnt from."""

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.phases import FineTuning, RecoveryTuning

KIND = "llama-causal-language-modeling"


def types(model):
    """Of the frequencies of rotary positions, and of the parameters."""
    return {model.model.rotary_emb.inv_freq.dtype}, {parameter.dtype for parameter in model.parameters()}


def exact(model, reference):
    return torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("make", [FineTuning, RecoveryTuning])
def test_rotary_positions(make, trainer, make_data, tmp_path):
    reference = tiny.route_(tiny.dense(KIND)) if make is RecoveryTuning else tiny.dense(KIND)
    save_artifact(reference, tmp_path / "before", [PhaseRecord("RouterRegression")])
    settings = {"num_held_out": 0} if make is RecoveryTuning else {}
    phase = make(hidden_weight=1.0, init_from=str(tmp_path / "before"), **settings)
    trainer(precision="bf16-true").fit(phase, datamodule=make_data(KIND))
    taught = phase._teacher if make is RecoveryTuning else phase._kept._before
    for model in (phase.model, taught.model):
        assert types(model) == ({torch.float32}, {torch.bfloat16})
        assert exact(model, reference)


def test_an_evaluation(trainer, make_data, tmp_path):
    reference = tiny.dense(KIND)
    save_artifact(reference, tmp_path / "before", [PhaseRecord("FineTuning")])
    phase = FineTuning(init_from=str(tmp_path / "before"))
    trainer(precision="bf16-true").test(phase, datamodule=make_data(KIND))
    assert types(phase.model) == ({torch.float32}, {torch.bfloat16})
    assert exact(phase.model, reference)


def test_a_device_and_a_type_at_once():
    model = tiny.dense(KIND)
    with adapter_for(model).exact_buffers(model):
        model.to("meta", torch.bfloat16)
    assert types(model) == ({torch.float32}, {torch.bfloat16})
    assert model.model.rotary_emb.inv_freq.is_meta


def test_other_models_are_cast_as_they_are(tmp_path):
    model = tiny.routed("timm_vit")
    save_artifact(model, tmp_path / "artifact")
    assert {parameter.dtype for parameter in load_model(tmp_path / "artifact", dtype="bfloat16").parameters()} == {
        torch.bfloat16
    }
