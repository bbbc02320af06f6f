"""Phases that only gather statistics pass over the data once, whatever the trainer is told, and leave it as it was."""

import pytest
import tiny
import torch
from digits_models import digits_source
from lightning.pytorch.callbacks import Timer

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.phases import CutoffFitting, ExpertClustering, FineTuning, ImportanceScoring, _phase


@pytest.mark.parametrize(
    ("make", "batches"), [(lambda **start: ExpertClustering(8, num_samples=10**6, **start), 4), (ImportanceScoring, 4)]
)
def test_one_epoch_is_run_and_the_data_shuffled_again_afterwards(trainer, digits, artifact, make, batches):
    phase = make(init_from=artifact("dense"))
    run = trainer(max_epochs=3)
    run.fit(phase, datamodule=digits)
    assert run.current_epoch == 1
    assert run.global_step in (0, batches)
    assert not digits.ordered


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        ("dense", lambda start: ImportanceScoring(init_from=start)),
        ("dense", lambda start: ExpertClustering(8, init_from=start)),
        ("routed", lambda start: CutoffFitting(num_tokens=100, init_from=start)),
    ],
)
def test_a_limit_of_time_does_not_end_it_before(trainer, digits, artifact, caplog, stage, make):
    start = artifact(stage)
    whole, limited = make(start), make(start)
    trainer(limit_train_batches=1.0).fit(whole, datamodule=digits)
    run = trainer(limit_train_batches=1.0, max_time={"seconds": 0})
    caplog.clear()
    run.fit(limited, datamodule=digits)
    (said,) = [message for message in caplog.messages if message.startswith("max_time")]
    assert said == f"max_time: {type(whole).__name__} goes on to its end; a part of its samples would be wrong."
    tensors, expected = limited.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in expected.items())
    for name, part in whole.tensors().items():
        assert all(torch.equal(value, limited.tensors()[name][key]) for key, value in part.items())
    assert [each._duration for each in run.callbacks if isinstance(each, Timer)] == [0.0]


def test_the_model_has_its_experts_once_training_ends_and_not_before(trainer, digits, artifact):
    phase = ExpertClustering(8, init_from=artifact("dense"))
    trainer().fit(phase, datamodule=digits)
    assert set(moe_layers(phase.model)) == {"blocks.0.mlp", "blocks.1.mlp"}


def test_what_a_phase_gathers_comes_before_its_last_structure(monkeypatch):
    order = []
    monkeypatch.setattr(_phase, "restore_best_", lambda phase: order.append("restore_best_"))

    class Watched(FineTuning):
        def conclude(self):
            order.append("conclude")

        def finish_(self, model):
            order.append("finish_")

    phase = Watched(source=digits_source())
    monkeypatch.setattr(phase, "_keep_measured", lambda: None)
    phase.on_train_end()
    phase.end_training()  # once
    assert order == ["restore_best_", "conclude", "finish_"]


@pytest.mark.parametrize(("name", "epochs"), [("ExpertClustering", 1), ("FineTuning", None)])
def test_the_command_line_asks_for_one_epoch_of_them_alone(tmp_path, name, epochs):
    save_artifact(tiny.dense(), tmp_path / "artifact", [PhaseRecord("FineTuning")])
    sizes = ["--model.init_args.num_experts=8"] if name == "ExpertClustering" else []
    start = f"--model.init_args.init_from={tmp_path / 'artifact'}"
    opening = PhaseCLI(args=["--model", name, start, *sizes, "--data", "Digits"], run=False)
    assert opening.config.trainer.max_epochs == epochs
