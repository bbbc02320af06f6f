"""What routers learn from, computed once: the same routers, fewer passes, and off where it would not be the same."""

from collections import namedtuple
from functools import partial

import lightning as L
import pytest
import tiny
import torch

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.data import Classification, Digits
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.phases import ExpertSelection, RouterRegression, _router_training

EPOCHS = 3
BATCHES = 4


class FixedOrder(tiny.TextData):
    """32 texts of 6 tokens, in the same order each epoch."""

    def load(self):
        ids = torch.randint(5, 40, (40, 6), generator=torch.Generator().manual_seed(0))
        samples = [{"input_ids": row, "labels": number % len(tiny.LABELS)} for number, row in enumerate(ids)]
        splits = {"train": samples[:32], "validation": samples[32:36], "test": samples[36:]}
        return splits, Classification(tiny.LABELS)

    def setup(self, stage=None):
        super().setup(stage)
        self.ordered = True


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The artifact of a ReLU BERT with 8 experts a layer."""
    torch.manual_seed(0)
    model = tiny.dense("bert")
    convert_to_moe_(model, ExpertsConfig(8))
    folder = tmp_path_factory.mktemp("cache") / "experts"
    save_artifact(model, folder, [PhaseRecord("ExpertClustering")])
    return str(folder)


@pytest.fixture
def said(monkeypatch):
    """Lines that the phase says."""
    lines = []
    monkeypatch.setattr(_router_training, "notice", lines.append)
    return lines


@pytest.fixture
def fit(trainer, experts):
    """Fit a phase; gives it, its trainer, and in which epochs the model was run on training samples."""

    def run(make, data, ckpt_path=None, **kwargs):
        torch.manual_seed(0)
        phase, passes = make(init_from=experts, optimizer=partial(torch.optim.Adam, lr=1e-2)), []
        run_layers = phase.run_layers

        def counted(batch):
            passes.extend([phase.current_epoch] if phase.trainer.training else [])
            run_layers(batch)

        phase.run_layers = counted
        own = trainer(**{"max_epochs": EPOCHS, "limit_train_batches": 1.0, **kwargs})
        own.fit(phase, datamodule=data, ckpt_path=ckpt_path)
        return phase, own, passes

    return run


def routers(phase):
    return {name: value for name, value in phase.model.state_dict().items() if ".router." in name}


@pytest.mark.parametrize(
    ("make", "precision", "on_disk"),
    [
        (partial(RouterRegression, 8), "32-true", False),
        (partial(RouterRegression, 8), "bf16-mixed", True),
        (partial(ExpertSelection, 3), "bf16-mixed", False),
        (partial(ExpertSelection, 3), "32-true", True),
    ],
)
def test_gives_the_routers_of_the_whole_computation(fit, monkeypatch, make, precision, on_disk):
    monkeypatch.setattr(torch, "randperm", lambda number, generator=None: torch.arange(number))
    settings = {"precision": precision, "accumulate_grad_batches": 3}
    plain, run, passes = fit(partial(make, cache_memory=0), FixedOrder(8), **settings)
    assert passes == [epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]
    steps = run.global_step
    if on_disk:
        monkeypatch.setattr(_router_training, "MIB", 20_000)  # less than two batches
    cached, run, passes = fit(partial(make, cache_memory=1), FixedOrder(8), **settings)
    assert passes == [0] * BATCHES
    assert run.global_step == steps == 2 * EPOCHS
    for name, value in routers(plain).items():
        torch.testing.assert_close(routers(cached)[name], value, rtol=1e-5, atol=1e-6)


def test_shuffles_tokens_in_batches_of_all_samples(fit):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, phase, batch, batch_idx):
            seen.append((trainer.current_epoch, batch))

        def on_validation_start(self, trainer, phase):
            assert phase._cache is None or phase._cache.rows.added == BATCHES  # validation adds nothing

    phase, run, _ = fit(partial(RouterRegression, 8), tiny.TextData(8), callbacks=[Watch()])
    epochs = [[batch for epoch, batch in seen if epoch == number] for number in range(EPOCHS)]
    assert [len(epoch) for epoch in epochs] == [BATCHES] * EPOCHS
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in epochs[0])
    for epoch in epochs[1:]:
        assert {len(rows) for rows in epoch} <= {num_tokens // BATCHES, num_tokens // BATCHES + 1}
    second, third = (torch.cat(epoch) for epoch in epochs[1:])
    assert len(second) == num_tokens
    assert not torch.equal(second, third)
    assert sorted(second.tolist()) == sorted(third.tolist())
    assert phase._cache is None  # nothing is kept when the training is over
    assert run.train_dataloader.cached is None


@pytest.mark.parametrize(
    ("data", "limit", "reason"),
    [
        (tiny.TextData, 2, "each epoch sees another 2 of the 4 batches"),
        (type("Augmented", (tiny.TextData,), {"augmented": True}), 1.0, "each epoch sees other samples, since the"),
    ],
)
def test_off_where_epochs_see_different_samples(fit, said, data, limit, reason):
    _, _, passes = fit(partial(RouterRegression, 8), data(8), limit_train_batches=limit)
    assert set(passes) == {0, 1, 2}
    assert len(said) == 1
    assert said[0].startswith(f"Router inputs are not cached: {reason}")


def test_data_says_whether_it_is_augmented():
    assert Digits().augmented
    assert not Digits(augment=False).augmented
    assert not tiny.TextData(8).augmented


def test_off_in_a_training_of_one_epoch(fit, said):
    kept = []
    watch = type(
        "Watch", (L.Callback,), {"on_train_batch_end": lambda self, trainer, phase, *_: kept.append(phase._cache)}
    )
    fit(partial(RouterRegression, 8), tiny.TextData(8), max_epochs=1, callbacks=[watch()])
    fit(partial(RouterRegression, 8), tiny.TextData(8), max_epochs=-1, max_steps=BATCHES, callbacks=[watch()])
    assert kept == [None] * 2 * BATCHES
    assert said == []


def test_goes_on_without_where_the_disk_has_no_room(fit, monkeypatch, caplog):
    monkeypatch.setattr(_router_training, "MIB", 20_000)
    usage = namedtuple("usage", "free")(20_000)
    monkeypatch.setattr("d2dmoe_pl.phases._row_cache.shutil.disk_usage", lambda folder: usage)
    _, _, passes = fit(partial(RouterRegression, 8, cache_memory=1), FixedOrder(8))
    assert passes == [epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]
    lines = [record.message for record in caplog.records if record.name == _router_training.__name__]
    assert len(lines) == 1
    assert lines[0].startswith("router inputs are not cached: [Errno 28] about 0 MiB are needed, and half of the 0 MiB")


@pytest.mark.parametrize("saved_at", [2, 4, 6, 14])
def test_resumed_it_is_made_again_and_the_routers_are_the_same(fit, tmp_path, saved_at):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, phase, outputs, batch, batch_idx):
            if trainer.global_step == saved_at:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    make = partial(RouterRegression, 8)
    phase, whole, _ = fit(make, tiny.TextData(8), max_epochs=4, callbacks=[Save()])
    resumed, run, passes = fit(make, tiny.TextData(8), str(tmp_path / "saved.ckpt"), max_epochs=4)
    assert len(passes) == BATCHES
    assert run.global_step == whole.global_step
    assert all(torch.equal(routers(resumed)[name], value) for name, value in routers(phase).items())


def test_broken_off_and_fitted_again(trainer, experts):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer, phase, outputs, batch, batch_idx):
            if trainer.global_step == BATCHES + 1:
                raise RuntimeError("broken off")

    sizes = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, phase):
            sizes.append(phase._cache.rows.added)

    phase = RouterRegression(8, init_from=experts)
    settings = {"max_epochs": EPOCHS, "limit_train_batches": 1.0}
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(callbacks=[Break()], **settings).fit(phase, datamodule=tiny.TextData(8))
    trainer(callbacks=[Watch()], **settings).fit(phase, datamodule=tiny.TextData(8))
    assert sizes == [BATCHES] * EPOCHS


def test_negative_memory():
    with pytest.raises(ConfigError, match="cache_memory=-1: must not be negative; MiB, 0 for no cache"):
        RouterRegression(cache_memory=-1)
