"""Lightning's averages of weights leave alone what is not averaged, and never give back a model before training."""

from functools import partial

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.phases import CutoffFitting, FineTuning, RouterRegression, StandInFitting
from d2dmoe_pl.phases._exact_averages import ExactAverages

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def start(tmp_path):
    def make(stage):
        model = tiny.routed("bert") if stage == "RouterRegression" else tiny.dense("bert")
        if stage == "ExpertClustering":
            convert_to_moe_(model, ExpertsConfig(8, 4))
        save_artifact(model, tmp_path / stage, [PhaseRecord(stage)])
        return str(tmp_path / stage)

    return make


def fitted(trainer, phase, *callbacks, **settings):
    torch.manual_seed(0)  # by which data is drawn
    runner = trainer(max_epochs=3, callbacks=[SaveArtifact(), *callbacks], **settings)
    runner.fit(phase, datamodule=tiny.TextData(8))
    return load_model(f"{runner.log_dir or runner.default_root_dir}/artifact").state_dict()


class _Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.moving = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.rand(1000), requires_grad=False)
        self.register_buffer("ids", torch.arange(512))
        self.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize("several", [None, get_ema_multi_avg_fn(0.9995)])
@pytest.mark.parametrize("decay", [0.9, 0.9995])
def test_what_does_not_change_stays_as_it_is(decay, several):
    phase = _Holder()
    before = {name: value.clone() for name, value in phase.state_dict().items()}
    callback = EMAWeightAveraging(decay=decay)
    by = callback._kwargs if several is None else {"multi_avg_fn": several}
    callback._average_model = AveragedModel(phase, use_buffers=True, **by)
    trainer = type("Trainer", (), {"callbacks": [callback]})()
    ExactAverages().setup(trainer, phase, "fit")
    for step in range(1000):
        with torch.no_grad():
            phase.moving.fill_(step / 1000)
            phase.mean.fill_(step / 1000)
        callback._average_model.update_parameters(phase)
    averaged = callback._average_model.module
    assert torch.equal(averaged.ids, before["ids"])
    assert torch.equal(averaged.frozen, before["frozen"])
    assert 0 < averaged.moving[0] < phase.moving[0]
    torch.testing.assert_close(averaged.mean, averaged.moving.detach())


def test_weights_that_are_never_averaged_are_those_that_were_trained(trainer, start):
    folder = start("FineTuning")
    plain = fitted(trainer, FineTuning(init_from=folder, optimizer=SGD))
    late = EMAWeightAveraging(update_starting_at_step=10**6)
    followed = fitted(trainer, FineTuning(init_from=folder, optimizer=SGD), late)
    assert all(torch.equal(value, followed[name]) for name, value in plain.items())


def test_frozen_weights_stay_and_the_others_are_averaged(trainer, start):
    folder = start("ExpertClustering")
    before = load_model(folder).state_dict()
    make = partial(RouterRegression, 8, init_from=folder, optimizer=SGD)
    plain, averaged = fitted(trainer, make()), fitted(trainer, make(), EMAWeightAveraging(decay=0.99))
    assert {name for name in plain if not torch.equal(plain[name], averaged[name])} == {
        name for name in plain if ".router." in name
    }
    assert all(torch.equal(value, averaged[name]) for name, value in before.items() if ".router." not in name)


@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("make", [partial(StandInFitting, 4, 100), partial(CutoffFitting, 0.5, 0.5, num_tokens=100)])
def test_calibrations_refuse_them(trainer, start, make, callback):
    phase = make(init_from=start("RouterRegression"))
    said = rf"^callbacks={callback.__name__}: must be left out of {type(phase).__name__}, which has no steps to average"
    with pytest.raises(ConfigError, match=said):
        fitted(trainer, phase, callback())


def test_a_training_that_had_ended_gives_its_averages_when_it_is_resumed(trainer, start, tmp_path):
    folder = start("FineTuning")
    make = partial(FineTuning, init_from=folder, optimizer=SGD)
    path = tmp_path / "end.ckpt"

    class SaveAtTheEnd(L.Callback):
        def on_train_epoch_end(self, trainer, phase):
            trainer.save_checkpoint(path)

    whole, data = make(), tiny.TextData(8)
    runner = trainer(max_epochs=2, callbacks=[SaveArtifact(), EMAWeightAveraging(decay=0.99), SaveAtTheEnd()])
    runner.fit(whole, datamodule=data)
    resumed = make()
    again = trainer(max_epochs=2, callbacks=[SaveArtifact(), EMAWeightAveraging(decay=0.99)])
    again.fit(resumed, datamodule=data, ckpt_path=path, weights_only=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
