"""In a narrow type, what a model has in float32 in any stays so: in training, in evaluation, in what is learnt from."""

import pytest
import tiny
import torch
from torchmetrics import Metric

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import PhaseRecord, load_model, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.data import Digits
from d2dmoe_pl.data.task import Regression
from d2dmoe_pl.phases import BudgetCalibration, FineTuning, ImportanceScoring, MoEBERTDistillation, RecoveryTuning
from d2dmoe_pl.report.single_samples import expert_loads, single_samples

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


class Years(tiny.TextData):
    """Texts with a year each, which bfloat16 has but every eighth of."""

    head = "regression"

    def load(self):
        splits, _ = super().load()
        for split in splits.values():
            for index, sample in enumerate(split):
                sample["labels"] = 1900.25 + index
        return splits, Regression("similarity")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_pictures_in_the_type_of_an_earlier_artifact(trainer, artifact, precision, tmp_path):
    """Which 32-true leaves as it is, so that pictures have to follow."""
    path = artifact("calibrated")
    save_artifact(load_model(path, dtype="bfloat16"), tmp_path / "narrow", read_artifact(path).history)
    data = Digits(batch_size=32)
    phase = RecoveryTuning(init_from=str(tmp_path / "narrow"), num_held_out=32)
    trainer(precision=precision).fit(phase, datamodule=data)
    assert {parameter.dtype for parameter in phase.model.parameters()} == {torch.bfloat16}
    tested = BudgetCalibration(init_from=str(tmp_path / "narrow"))
    trainer(precision=precision).test(tested, datamodule=data, verbose=False)
    assert all(sample.picture is not None for sample in single_samples(tested, 2))
    assert expert_loads(tested, 8)


def test_labels_and_sums_of_metrics(trainer, tmp_path):
    save_artifact(tiny.dense("bert-regression"), tmp_path / "before", [PhaseRecord("FineTuning")])
    phase, data = FineTuning(init_from=str(tmp_path / "before")), Years(1)
    seen, losses, task_loss, logits = [], [], phase.task_loss, phase.logits

    def told(given, batch):
        seen.append(batch["labels"].item())
        return task_loss(given, batch)

    def answered(batch):
        given = logits(batch)
        if not phase.trainer.training:
            losses.append((given.double().squeeze() - batch["labels"].double().squeeze()).square().item())
        return given

    phase.task_loss, phase.logits = told, answered
    settings = {"limit_train_batches": 1.0, "limit_val_batches": 0, "precision": "bf16-true"}
    trainer(**settings).fit(phase, datamodule=data)
    assert sorted(seen) == [1900.25 + index for index in range(32)]
    (scores,) = trainer(**settings).test(phase, datamodule=data, verbose=False)
    assert scores["test/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    states = [value for metric in phase.metrics.modules() if isinstance(metric, Metric) for value in sums(metric)]
    assert states
    assert {value.dtype for value in states} <= {torch.float32, torch.float64}


def sums(metric):
    """The states of a metric that are not whole numbers."""
    values = (getattr(metric, name) for name in metric._defaults)
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def test_sums_of_metrics_that_are_made_within_a_step(trainer, tmp_path):
    """As calibration makes them, where trainers have changed torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        metrics = Regression("similarity").metrics()
    finally:
        torch.set_default_dtype(before)
    states = [value for metric in metrics.modules() if isinstance(metric, Metric) for value in sums(metric)]
    assert {value.dtype for value in states} == {torch.float32, torch.float64}


def test_routing_of_sentences(trainer, tmp_path):
    save_artifact(tiny.dense("bert"), tmp_path / "before", [PhaseRecord("FineTuning")])
    scoring = ImportanceScoring(init_from=str(tmp_path / "before"))
    trainer(callbacks=[SaveArtifact()]).fit(scoring, datamodule=tiny.TextData(8))
    importance = str(tmp_path / "run" / "artifact")
    phase = MoEBERTDistillation(2, expert_dim=12, num_shared=6, routing="gate_sentence", init_from=importance)
    trainer(precision="bf16-true").fit(phase, datamodule=tiny.TextData(8))
    assert all(parameter.isfinite().all() for parameter in phase.model.parameters())
