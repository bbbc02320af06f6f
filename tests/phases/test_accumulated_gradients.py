"""A training that accumulates gradients goes on from a checkpoint between two steps as if nothing had been."""

import lightning as L
import pytest
import torch
from digits_models import digits_source
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from d2dmoe_pl.data import Digits
from d2dmoe_pl.phases import FineTuning
from d2dmoe_pl.phases._accumulated_gradients import GRADIENTS


class SaveAfter(L.Callback):
    """Save after so many batches, before the callbacks do that a phase brings along."""

    def __init__(self, batches, file):
        self.left = batches
        self.file = file

    def on_train_batch_end(self, trainer, phase, outputs, batch, batch_idx):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.file)


class SeeGradients(L.Callback):
    """Which parameters have gradients before the first batch."""

    first = None

    def on_train_batch_start(self, trainer, phase, batch, batch_idx):
        if self.first is None:
            self.first = {name for name, parameter in phase.named_parameters() if parameter.grad is not None}


def trained(trainer, callbacks=(), ckpt_path=None, **kwargs):
    """The weights after three epochs of seven batches, and the steps."""
    settings = {"limit_train_batches": 7, "limit_val_batches": 1, "max_epochs": 3, **kwargs}
    phase = FineTuning(source=digits_source())
    runner = trainer(callbacks=list(callbacks), **settings)
    runner.fit(phase, datamodule=Digits(16), ckpt_path=ckpt_path)
    return phase.model.state_dict(), runner.global_step


# steps are after 3, 6 and 7 batches of each epoch; or 5 and 7 of the first, and 2, 4, 6 and 7 of others
@pytest.mark.parametrize("batches", [1, 3, 5, 7, 9, 13, 21])
@pytest.mark.parametrize("scheduling", [None, {0: 5, 1: 2}])
def test_goes_on_from_any_batch(trainer, tmp_path, batches, scheduling):
    def settings():
        if scheduling is None:
            return {"accumulate_grad_batches": 3, "callbacks": []}
        return {"callbacks": [GradientAccumulationScheduler(dict(scheduling))]}

    file = tmp_path / "between.ckpt"
    first = settings()
    expected, steps = trained(trainer, **{**first, "callbacks": [*first["callbacks"], SaveAfter(batches, file)]})
    assert steps == (9 if scheduling is None else 2 + 4 + 4)
    found, found_steps = trained(trainer, ckpt_path=str(file), **settings())
    assert found_steps == steps
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("batches", "waits"), [(5, True), (6, False), (7, False)])
def test_checkpoints_have_gradients_only_where_a_step_waits(trainer, tmp_path, batches, waits):
    file = tmp_path / "saved.ckpt"
    trained(trainer, [SaveAfter(batches, file)], accumulate_grad_batches=3, max_epochs=1)
    assert (GRADIENTS in torch.load(file, weights_only=True)) == waits


def test_parameters_without_gradients_have_none_afterwards(trainer, tmp_path):
    file = tmp_path / "saved.ckpt"
    trained(trainer, [SaveAfter(5, file)], accumulate_grad_batches=3, max_epochs=1)
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint[GRADIENTS]
    assert all(checkpoint["state_dict"][name].shape == value.shape for name, value in checkpoint[GRADIENTS].items())
    del checkpoint[GRADIENTS]["model.head.bias"]
    torch.save(checkpoint, file)

    see = SeeGradients()
    trained(trainer, [see], ckpt_path=str(file), accumulate_grad_batches=3, max_epochs=1)
    assert see.first == set(checkpoint[GRADIENTS])
