"""The sweep reports what it should; a NaN stops the run with the weights intact."""

import csv

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, StopOnNonFinite, TauSweep
from d2dmoe_pl.callbacks.sweep_table import SweepRow, as_table, draw_curve, shown
from d2dmoe_pl.data import Digits
from d2dmoe_pl.data.language_modeling.token_prediction import TokenPrediction
from d2dmoe_pl.errors import ConfigError, NonFiniteLossError
from d2dmoe_pl.phases import FineTuning, RouterRegression
from d2dmoe_pl.structure import describe

pytestmark = pytest.mark.drawn


@pytest.fixture
def routed_text(tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("FineTuning", {"test/accuracy": 0.4})])
    return str(tmp_path / "routed")


def read(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


class TestTauSweep:
    def sweep(self, trainer, path, taus, **kwargs):
        sweep = TauSweep(taus, **kwargs)
        phase = RouterRegression(8, tau=0.5, init_from=path)
        run = trainer(callbacks=[sweep])
        run.test(phase, datamodule=tiny.TextData(5), verbose=False)
        return sweep, phase, run

    def test_rows_equal_a_plain_evaluation_at_each_tau(self, trainer, routed_text, tmp_path):
        sweep, phase, _ = self.sweep(trainer, routed_text, [0.0, 0.5, 1.0])
        for row in sweep.rows["test"]:
            plain = trainer(logger=False)
            plain.test(
                RouterRegression(8, tau=row.setting, init_from=routed_text), datamodule=tiny.TextData(3), verbose=False
            )
            assert row.score == pytest.approx(100 * float(plain.callback_metrics["test/accuracy"]))
            assert row.loss == pytest.approx(float(plain.callback_metrics["test/loss"]), rel=1e-4)
        assert {str(made["gate"]["tau"]) for made in describe(phase.model).values()} == {"0.5"}  # as it was

    def test_in_the_trainers_precision(self, trainer, routed_text):
        sweep, phase = TauSweep([0.5]), RouterRegression(8, tau=0.5, init_from=routed_text)
        mixed = trainer(callbacks=[sweep], precision="bf16-mixed")
        mixed.test(phase, datamodule=tiny.TextData(5), verbose=False)
        plain, _, _ = self.sweep(trainer, routed_text, [0.5])
        loss = float(mixed.callback_metrics["test/loss"])
        assert sweep.rows["test"][0].loss == pytest.approx(loss, rel=1e-6)
        assert abs(plain.rows["test"][0].loss - loss) > 1e-5 * loss

    def test_costs(self, trainer, routed_text):
        sweep, _, _ = self.sweep(trainer, routed_text, [0.0, 0.5, 1.0])
        low, middle, full = sweep.rows["test"]
        assert low.experts_percent < middle.experts_percent < full.experts_percent == 100
        router_share = 100 * 8 * (24 + 8) / (2 * 24 * 48)
        for row in (low, middle, full):
            assert row.experts_percent == pytest.approx(sum(row.layers.values()) / 2)
        for row in (low, middle):
            assert row.ffn_flops_percent == pytest.approx(row.experts_percent + router_share)
        assert full.ffn_flops_percent == full.model_flops_percent == 100  # there, no router runs
        assert low.model_flops / low.model_flops_percent == pytest.approx(full.model_flops / full.model_flops_percent)

    def test_the_same_at_any_batch_size(self, trainer, routed_text):
        rows = []
        for size in (1, 8):
            sweep = TauSweep([0.3, 0.9])
            phase = RouterRegression(8, init_from=routed_text)
            trainer(callbacks=[sweep]).test(phase, datamodule=tiny.TextData(size), verbose=False)
            rows.append(sweep.rows["test"])
        for one, other in zip(*rows, strict=True):
            assert (one.score, one.experts_percent, one.model_flops) == (
                other.score,
                other.experts_percent,
                other.model_flops,
            )

    def test_brackets_in_the_name_of_a_folder_are_no_markup(self, trainer, routed_text, tmp_path, capsys):
        logger = TensorBoardLogger(tmp_path / "[bold]", name="run", version="")
        trainer(callbacks=[TauSweep([1.0])], logger=logger).test(
            RouterRegression(8, tau=0.5, init_from=routed_text), datamodule=tiny.TextData(5), verbose=False
        )
        assert str(tmp_path / "[bold]" / "run" / "tau_sweep.png") in capsys.readouterr().out

    def test_csv_picture_table_and_tensorboard(self, trainer, routed_text, tmp_path, capsys):
        self.sweep(trainer, routed_text, [0.25, 1.0], rule="topk")
        records = read(tmp_path / "run" / "tau_sweep.csv")
        assert [(record["stage"], record["tau"]) for record in records] == [("test", "0.25"), ("test", "1.0")]
        assert float(records[0]["experts_percent/bert.encoder.layer.0.intermediate"]) == 25
        assert (tmp_path / "run" / "tau_sweep.png").read_bytes().startswith(b"\x89PNG")
        assert "test, rule topk" in capsys.readouterr().out
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        tags = events.Tags()
        assert {"tau_sweep/test", "tau_sweep/test_layers"} == set(tags["images"])
        assert not [tag for tag in tags["scalars"] if "tau" in tag]  # a dot a setting, hundreds of them
        table = events.Tensors("tau_sweep/test_table/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| 0.25 |" in table
        assert len(table.splitlines()) == 2 + 2

    def test_while_fitting_and_after_a_resume(self, trainer, tmp_path):
        save_artifact(experts_only(), tmp_path / "experts", [PhaseRecord("ExpertClustering")])
        sweep = TauSweep([0.5, 1.0])
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", filename="last")
        phase = RouterRegression(8, init_from=str(tmp_path / "experts"))
        trainer(callbacks=[sweep, checkpoint], enable_checkpointing=True).fit(phase, datamodule=tiny.TextData(5))
        assert [row.setting for row in sweep.rows["validation"]] == [0.5, 1.0]
        resumed = TauSweep([0.5, 1.0])
        run = trainer(callbacks=[resumed], max_epochs=1)
        phase = RouterRegression(8, init_from=str(tmp_path / "experts"))
        run.fit(
            phase, datamodule=tiny.TextData(5), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=False
        )
        assert resumed.rows == sweep.rows

    @pytest.mark.parametrize("taus", [[0.5, 1.5], [-0.1], []])
    def test_bad_taus(self, taus):
        with pytest.raises(ConfigError, match=r"tau.*\[0, 1\]"):
            TauSweep(taus)

    def test_a_phase_without_routers(self, trainer, digits):
        phase = FineTuning(source=tiny.SOURCES["timm_vit"]())
        with pytest.raises(
            ConfigError, match=r"TauSweep needs a phase that makes routers \(RouterRegression, .*\), not FineTuning"
        ):
            trainer(callbacks=[TauSweep()]).fit(phase, datamodule=digits)


def experts_only():
    model = tiny.routed("bert")
    for module in model.modules():
        if hasattr(module, "router"):
            module.router = module.gate = None
    return model


def test_table_and_curve_hold_the_numbers():
    rows = [SweepRow("test", 0.5, 0.125, "f1", 97.5, True, True, 12.0, 16.0, 2e6, 44.0, {"a": 12.0})]
    table = as_table(rows, "title")
    assert [list(column.cells) for column in table.columns] == [
        ["0.5"],
        ["97.50"],
        ["0.1250"],
        ["12.0"],
        ["16.0"],
        ["2.000"],
        ["44.0"],
    ]
    assert table.columns[1].header == "f1 %"
    assert rows[0].as_record() == {
        "stage": "test",
        "tau": 0.5,
        "loss": 0.125,
        "f1": 97.5,
        "experts_percent": 12.0,
        "ffn_flops_percent": 16.0,
        "model_flops": 2e6,
        "model_flops_percent": 44.0,
        "samples": 0,
        "experts_percent/a": 12.0,
    }
    axes = draw_curve(rows, {"dense": 98.0}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[16.0, 97.5]]
    assert axes.get_legend().texts[1].get_text() == "dense: 98.00%"


def test_a_metric_that_is_no_share_and_better_when_lower():
    task = TokenPrediction("causal-language-modeling", "ab")
    assert shown(12.5, task) == 12.5
    rows = [SweepRow("test", 1.0, 2.5, "perplexity", 12.5, False, False, 12.0, 16.0, 2e6, 44.0, {})]
    header = "perplexity (lower is better)"
    assert as_table(rows, "title").columns[1].header == header
    assert rows[0].as_record()["perplexity"] == 12.5
    axes = draw_curve(rows, {"dense": 12.0}).axes[0]
    assert axes.get_ylabel() == header
    assert axes.get_legend().texts[1].get_text() == "dense: 12.00"


class Explodes(FineTuning):
    """Gives a NaN loss at the given step."""

    step = 5

    def task_loss(self, logits, batch):
        loss = super().task_loss(logits, batch)
        return loss * float("nan") if self.training and self.global_step == self.step else loss


class TestStopOnNonFinite:
    def test_stops_names_and_keeps(self, trainer, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", filename="last", enable_version_counter=False)
        phase = Explodes(source=tiny_digits_source())
        run = trainer(
            callbacks=[StopOnNonFinite(), SaveArtifact(), checkpoint], max_epochs=3, enable_checkpointing=True
        )
        message = r"Explodes: the loss is nan at step 5; stopped, the last good checkpoint is .*last.ckpt"
        with pytest.raises(NonFiniteLossError, match=message):
            run.fit(phase, datamodule=Digits(16))
        kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        assert kept["global_step"] == 4
        assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())
        assert all(torch.isfinite(parameter).all() for parameter in phase.model.parameters())
        assert not (tmp_path / "run" / "artifact").exists()

    def test_before_any_checkpoint(self, trainer, digits):
        phase = Explodes(source=tiny_digits_source())
        phase.step = 0
        with pytest.raises(NonFiniteLossError, match="at step 0; stopped, there is no checkpoint yet"):
            trainer(callbacks=[StopOnNonFinite()]).fit(phase, datamodule=digits)


def tiny_digits_source():
    return tiny.SOURCES["timm_vit"]()


class TestSaveArtifact:
    def test_history_grows_with_validation_metrics(self, trainer, digits, tmp_path):
        run = trainer(callbacks=[SaveArtifact()])
        run.fit(FineTuning(source=tiny_digits_source()), datamodule=digits)
        second = trainer(callbacks=[SaveArtifact()], logger=False, default_root_dir=tmp_path / "second")
        second.fit(FineTuning(init_from=str(tmp_path / "run" / "artifact")), datamodule=digits)
        history = read_artifact(tmp_path / "second" / "artifact").history
        assert [record.phase for record in history] == ["FineTuning", "FineTuning"]
        assert set(history[0].metrics) == {"validation/loss", "validation/accuracy"}
        assert (tmp_path / "run" / "artifact" / "preprocessor_config.json").is_file()

    def test_nothing_is_written_for_a_fast_dev_run(self, digits, tmp_path):
        run = L.Trainer(
            fast_dev_run=True, accelerator="cpu", callbacks=[SaveArtifact()], default_root_dir=tmp_path, logger=False
        )
        run.fit(FineTuning(source=tiny_digits_source()), datamodule=digits)
        assert not list(tmp_path.rglob("artifact"))
