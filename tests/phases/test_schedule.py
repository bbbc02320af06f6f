"""Learning rates by what ends a training: epochs, steps, time, or nothing; and after a resumption on other devices."""

import contextlib
import itertools
import time

import lightning as L
import pytest
from digits_models import digits_source
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer

from d2dmoe_pl.data import Digits
from d2dmoe_pl.phases import AttentionDistillation, FineTuning, RecoveryTuning, SparsityEnforcement
from d2dmoe_pl.phases._schedule import learning_rate_factor


class Rates(L.Callback):
    """The learning rate of each step; stops after ``last`` of them, if given."""

    def __init__(self, last=None):
        self.seen = []
        self.last = last

    def on_train_batch_start(self, trainer, phase, batch, batch_idx):
        if self.last is not None and len(self.seen) == self.last:
            raise KeyboardInterrupt

    def on_before_optimizer_step(self, trainer, phase, optimizer):
        phase.on_before_optimizer_step(optimizer)  # the module's own comes after
        self.seen.append(optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"])


def rates(trainer, data=None, ckpt_path=None, last=None, callbacks=(), warmup=0.2, **kwargs):
    seen = Rates(last)
    settings = {"limit_train_batches": 5, "limit_val_batches": 1, "callbacks": [seen, *callbacks], **kwargs}
    phase = FineTuning(source=digits_source(), warmup=warmup)
    runner = trainer(**settings)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        runner.fit(phase, datamodule=data or Digits(16), ckpt_path=ckpt_path)
    return seen.seen, runner


def expected(total, start=0):
    return [learning_rate_factor(step / total, 0.2, "linear") for step in range(start, total)]


@pytest.mark.parametrize("total", [1, 3, 4, 5])
def test_a_warm_up_of_less_than_a_step_is_none(trainer, total):
    found, _ = rates(trainer, max_epochs=1, limit_train_batches=total)
    assert found == pytest.approx([1 - step / total for step in range(total)] if total < 5 else expected(total))


@pytest.fixture
def timer(monkeypatch):
    """By a clock that each time it is asked moves on by a quarter of a second, to 40."""
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    timer = Timer(duration={"seconds": 40})
    monkeypatch.setattr(timer, "time_elapsed", lambda stage="train": float(min(40, next(clock) // 4)))
    return timer


class Alphas(L.Callback):
    """The weight of the penalty at each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, phase, outputs, batch, batch_idx):
        self.seen.append(float(trainer.callback_metrics["train/alpha"]))


class TestWhatGoesAlong:
    @pytest.mark.parametrize("make", [SparsityEnforcement, AttentionDistillation])
    def test_penalties(self, make, trainer, artifact, timer):
        seen = {}
        stop = EarlyStopping("validation/loss", patience=1, min_delta=100.0)
        ways = {"epochs": {"max_epochs": 6}, "time": {"callbacks": [timer]}, "nothing": {"callbacks": [stop]}}
        for name, settings in ways.items():
            alphas = Alphas()
            callbacks = [alphas, *settings.pop("callbacks", [])]
            phase = make(alpha=2.0, schedule="linear", init_from=artifact("dense"))
            few = {"max_epochs": -1, "limit_train_batches": 5, "limit_val_batches": 1, **settings}
            trainer(**few, callbacks=callbacks).fit(phase, datamodule=Digits(16))
            seen[name] = alphas.seen
        assert seen["epochs"] == pytest.approx([2.0 * step / 30 for step in range(30)])
        assert seen["time"] == sorted(seen["time"])
        assert 0 <= seen["time"][0] < 0.3
        assert seen["time"][-1] > 1.7
        assert set(seen["nothing"]) == {2.0}

    def test_the_second_half(self, trainer, artifact, timer):
        phase = RecoveryTuning(num_held_out=0, init_from=artifact("routed"))
        few = {"max_epochs": -1, "limit_train_batches": 5, "limit_val_batches": 1}
        runner = trainer(**few, callbacks=[timer])
        runner.fit(phase, datamodule=Digits(16))
        assert 0.3 * runner.global_step < phase._average.steps < 0.7 * runner.global_step


class TestWhatEndsATraining:
    def test_epochs(self, trainer):
        assert rates(trainer, max_epochs=3)[0] == expected(15)

    def test_steps_even_before_the_epochs_do(self, trainer):
        assert rates(trainer, max_epochs=-1, max_steps=7)[0] == expected(7)
        assert rates(trainer, max_epochs=3, max_steps=7)[0] == expected(7)

    def test_accumulated_gradients(self, trainer):
        assert rates(trainer, max_epochs=2, accumulate_grad_batches=2)[0] == expected(6)

    def test_gradients_accumulated_otherwise_each_epoch(self, trainer):
        def scheduler():
            return GradientAccumulationScheduler({0: 5, 1: 2})

        assert rates(trainer, max_epochs=3, callbacks=[scheduler()])[0] == expected(1 + 3 + 3)
        assert rates(trainer, max_epochs=3, max_steps=5, callbacks=[scheduler()])[0] == expected(5)

    def test_time(self, trainer, timer):
        seen, _ = rates(trainer, max_epochs=-1, callbacks=[timer])
        assert len(seen) > 10
        assert max(seen) > 0.9
        assert seen.index(max(seen)) < len(seen) / 2
        assert 0 < seen[-2] < 0.4
        assert sum(rate == 0 for rate in seen) <= 1 + seen.count(seen[0])

    def test_nothing(self, trainer, caplog):
        caplog.set_level("INFO")
        stop = EarlyStopping("validation/loss", patience=1, min_delta=100.0)
        seen, _ = rates(trainer, max_epochs=-1, callbacks=[stop])
        assert len(seen) == 10
        assert set(seen) == {1.0}
        said = [record.message for record in caplog.records if "learning rate" in record.message]
        assert len(said) == 1
        assert said[0].startswith("The learning rate stays as it is, without warm-up or decay: neither max_epochs nor")


class TestResumption:
    """Half of the training in 16 samples a step, the rest in more: as on more devices, an epoch has fewer steps."""

    def checkpoint(self, trainer, tmp_path, last, **kwargs):
        before, runner = rates(trainer, Digits(16), last=last, **kwargs)
        runner.save_checkpoint(tmp_path / "half.ckpt")
        return before, str(tmp_path / "half.ckpt")

    def test_as_before(self, trainer, tmp_path):
        before, checkpoint = self.checkpoint(trainer, tmp_path, 10, max_epochs=4)
        after, _ = rates(trainer, ckpt_path=checkpoint, max_epochs=4)
        assert before + after == expected(20)

    @pytest.mark.parametrize("steps", [2, 3, 10])
    def test_with_other_steps_an_epoch(self, trainer, tmp_path, steps):
        before, checkpoint = self.checkpoint(trainer, tmp_path, 10, max_epochs=4)
        assert before == expected(20)[:10]
        after, _ = rates(trainer, ckpt_path=checkpoint, max_epochs=4, limit_train_batches=steps)
        assert after == pytest.approx(expected(4 * steps, 2 * steps))
        assert after[-1] > 0

    def test_of_more_epochs(self, trainer, tmp_path):
        _, checkpoint = self.checkpoint(trainer, tmp_path, None, max_epochs=2)
        after, _ = rates(trainer, ckpt_path=checkpoint, max_epochs=4)
        assert after == pytest.approx(expected(20, 10))

    def test_by_steps(self, trainer, tmp_path):
        _, checkpoint = self.checkpoint(trainer, tmp_path, 10, max_epochs=-1, max_steps=20)
        after, _ = rates(trainer, ckpt_path=checkpoint, max_epochs=-1, max_steps=20, limit_train_batches=2)
        assert after == expected(20, 10)
