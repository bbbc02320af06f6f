"""Sparsity enforcement: activations get sparser, and what it refuses."""

import pytest
import tiny
import torch

from d2dmoe_pl.data import Classification
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.phases import SparsityEnforcement
from d2dmoe_pl.phases._preflight import preflight


class TestSparsityEnforcement:
    @pytest.mark.parametrize("penalty", ["l1", "hoyer"])
    def test_makes_activations_sparser_than_training_without(self, trainer, digits, artifact, penalty):
        zeros = {}
        for alpha in (0.0, 0.05):
            phase = SparsityEnforcement(
                penalty, alpha, init_from=artifact("dense"), optimizer=lambda p: torch.optim.Adam(p, lr=5e-3)
            )
            run = trainer(max_epochs=3, limit_train_batches=30)
            run.fit(phase, datamodule=digits)
            zeros[alpha] = float(run.callback_metrics["sparsity/zeros"])
        assert zeros[0.05] > zeros[0.0] + 0.1

    def test_gelu_without_displacement_is_refused_before_anything_runs(self, artifact):
        message = (
            "penalty='l1' with displacement=None: allowed only on ReLU, but blocks.0.mlp has GELU.*"
            r"set displacement \(e.g. -10 or 0\), or fine-tune with activation=relu first"
        )
        with pytest.raises(ConfigError, match=message):
            preflight([SparsityEnforcement("l1", init_from=artifact("dense", activation=None))])

    def test_gelu_with_displacement(self, trainer, digits, artifact):
        phase = SparsityEnforcement("hoyer", displacement=-2.0, init_from=artifact("dense", activation=None))
        run = trainer()
        run.fit(phase, datamodule=digits)
        assert run.callback_metrics["train/penalty"] > 0

    def test_loss_is_task_loss_plus_alpha_times_penalty(self, trainer, digits, artifact):
        phase = SparsityEnforcement("l1", alpha=0.3, init_from=artifact("dense"))
        run = trainer(limit_train_batches=1)
        run.fit(phase, datamodule=digits)
        parts = {key: float(run.callback_metrics[f"train/{key}"]) for key in ("loss", "task_loss", "penalty", "alpha")}
        assert parts["alpha"] == pytest.approx(0.3)
        assert parts["loss"] == pytest.approx(parts["task_loss"] + 0.3 * parts["penalty"], rel=1e-5)

    def test_padding_is_not_penalised(self):
        """The penalty of a padded batch is the mean over real tokens, each as if it stood alone."""
        model = tiny.dense("bert")
        inputs = tiny.batch("bert", size=4)
        phase = SparsityEnforcement("l1", alpha=1.0, init_from="-")
        phase.model, phase.task, phase._ffns = model, Classification(tiny.LABELS), select_ffns(model)
        phase.progress = lambda: 0.0
        logged = {}
        phase.log_dict = lambda values, **kwargs: logged.update(values)
        phase.log = lambda *args, **kwargs: None
        phase.training_step(inputs, 0)
        penalties, lengths = [], inputs["attention_mask"].sum(dim=1)
        padded_penalty = logged["train/penalty"].item()
        for row, length in enumerate(lengths):
            alone = {key: value[row : row + 1, :length] for key, value in inputs.items() if key != "labels"}
            phase.training_step({**alone, "labels": inputs["labels"][row : row + 1]}, 0)
            penalties.append(logged["train/penalty"].item())
        expected = sum(p * int(n) for p, n in zip(penalties, lengths, strict=True)) / int(lengths.sum())
        assert padded_penalty == pytest.approx(expected, rel=1e-4)

    def test_negative_alpha(self):
        with pytest.raises(ConfigError, match="alpha=-1: must not be negative"):
            SparsityEnforcement(alpha=-1)
