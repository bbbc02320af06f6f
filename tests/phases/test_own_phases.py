"""Phases of a user's own: steps, optimizers and measures in the place of those that are there."""

import pytest
import torch

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import FineTuning
from d2dmoe_pl.phases._preflight import preflight


class OwnValidation(FineTuning):
    def validation_step(self, batch, batch_idx):
        self.log("validation/loss", self.task_loss(self.logits(batch), batch) * 0 + 7)


class OwnOptimizer(FineTuning):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.25)


class WithoutReturn(FineTuning):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class EverySecond(FineTuning):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


def test_a_validation_step_that_measures_something_else_is_not_overruled(trainer, digits, artifact):
    phase = OwnValidation(init_from=artifact("dense"))
    trainer().fit(phase, datamodule=digits)
    assert phase.measured == {"validation/loss": 7.0}


def test_an_optimizer_without_our_schedule(trainer, digits, artifact):
    phase = OwnOptimizer(init_from=artifact("dense"))
    run = trainer()
    run.fit(phase, datamodule=digits)
    assert phase.progress() == 1.0
    assert run.logged_metrics["train/learning_rate"] == 0.25


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss(trainer, digits, artifact):
    with pytest.raises(ConfigError, match=r"^WithoutReturn: nothing was trained; training_step must return the loss$"):
        trainer().fit(WithoutReturn(init_from=artifact("dense")), datamodule=digits)
    trainer().fit(EverySecond(init_from=artifact("dense")), datamodule=digits)


class Another(FineTuning):
    def transform_(self, model):
        return torch.nn.Sequential(model)


class TheSame(FineTuning):
    def transform_(self, model):
        super().transform_(model)
        return model


def test_a_change_that_gives_another_model_is_told(trainer, digits, artifact):
    said = r"^Another.transform_: gives a Sequential; must change the model that it is given, in place, and give"
    with pytest.raises(ConfigError, match=said):
        trainer().fit(Another(init_from=artifact("dense")), datamodule=digits)
    with pytest.raises(ConfigError, match=said):
        preflight([Another(init_from=artifact("dense"))])
    preflight([TheSame(init_from=artifact("dense"))])
