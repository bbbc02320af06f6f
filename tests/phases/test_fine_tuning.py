"""Fine-tuning: what it learns, what it leaves, and how its learning rate goes."""

import pytest
import tiny
import torch
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.phases import FineTuning
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.phases._schedule import learning_rate_factor


class TestFineTuning:
    def test_learns_and_leaves_an_artifact(self, trainer, digits, tmp_path):
        phase = FineTuning(source=digits_source(), activation="relu", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
        run = trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0, callbacks=[SaveArtifact()])
        run.fit(phase, datamodule=digits)
        assert run.callback_metrics["validation/accuracy"] > 0.5
        model = load_model(tmp_path / "run" / "artifact")
        assert all(ffn.is_sparse for ffn in select_ffns(model))
        inputs = {"pixel_values": torch.rand(2, 1, 8, 8)}
        assert torch.equal(tiny.logits(model, inputs), tiny.logits(phase.model.eval(), inputs))
        assert model.label_names == DIGIT_LABELS

    def test_continues_from_an_artifact(self, trainer, digits, artifact):
        phase = FineTuning(init_from=artifact("dense"))
        trainer().fit(phase, datamodule=digits)
        assert [record.phase for record in phase.history] == ["FineTuning"]
        assert phase.model.training

    def test_any_optimizer_and_no_decay_of_biases(self, trainer, digits):
        phase = FineTuning(source=digits_source(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5))
        run = trainer()
        run.fit(phase, datamodule=digits)
        decayed, plain = run.optimizers[0].param_groups
        assert decayed["weight_decay"] == 0.5
        assert plain["weight_decay"] == 0.0
        assert all(parameter.dim() >= 2 for parameter in decayed["params"])
        assert len(decayed["params"]) + len(plain["params"]) == len(list(phase.model.parameters()))

    def test_neither_source_nor_artifact(self):
        message = "init_from=None: FineTuning needs the artifact of an earlier phase, or a source"
        with pytest.raises(ConfigError, match=message):
            preflight([FineTuning()])

    def test_both_source_and_artifact(self):
        with pytest.raises(ConfigError, match="init_from='x': allowed only without source"):
            FineTuning(init_from="x", source=digits_source())

    def test_bad_warmup(self):
        with pytest.raises(ConfigError, match=r"warmup=1.5: must lie in \[0, 1\]"):
            FineTuning(source=digits_source(), warmup=1.5)


def test_learning_rate_schedules():
    at = [0.0, 0.1, 0.2, 0.6, 1.0]
    assert [learning_rate_factor(p, 0.2, "none") for p in at] == [0, 0.5, 1, 1, 1]
    assert [learning_rate_factor(p, 0.2, "linear") for p in at] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [learning_rate_factor(p, 0.2, "cosine") for p in at] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_factor(0.0, 0.0, "linear") == 1


def test_relu_from_birth_is_said(caplog):
    with caplog.at_level("WARNING", logger="d2dmoe_pl"):
        FineTuning(activation="relu").transform_(tiny.dense("opt", activation=None))
        FineTuning(activation="relu").transform_(tiny.SOURCES["opt"]().build_structure(tiny.LABELS))
    assert [record.message for record in caplog.records] == [
        "OPTForSequenceClassification: has ReLU already; activation=relu changes nothing."
    ]
