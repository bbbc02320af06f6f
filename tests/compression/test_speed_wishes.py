"""A speed is found by the clock, beside what it is told to be compared with; and a model is left in its type."""

from functools import partial

import pytest
import torch

from d2dmoe_pl import compress, load_model
from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.cli import main
from d2dmoe_pl.compression.budget_for_target import budget_for
from d2dmoe_pl.compression.target import parse_target
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint
from d2dmoe_pl.report.measured_speed import Running


def clock(seconds_at_full, spread=0.0, expected=None):
    """Times that fall in proportion to a budget, in the place of those that are measured."""

    def measured(model, dense, batches, budgets, running):
        assert {"input_ids", "attention_mask"} <= set(batches[0])
        assert expected is None or running == expected
        times = {budget: Timing(seconds_at_full * budget, 0.0) for budget in budgets}
        return Timing(1.0, spread), times

    return measured


CLOCK = "d2dmoe_pl.compression.command.measured_times"


@pytest.mark.parametrize(
    ("wanted", "seconds", "share", "said"),
    [
        ("speed=1.25x", 1.0, 0.8, "speed=1.25x: 1."),
        ("speed=50x", 1.0, 0.33, "speed=50x cannot be reached here: 3.0"),
        ("speed=1.25x", 2.0, 0.4, "x as fast as dense, "),
    ],
)
def test_a_speed_is_found_by_the_clock(calibrated, monkeypatch, capfd, wanted, seconds, share, said):
    monkeypatch.setattr(CLOCK, clock(seconds))
    made = compress("model", "texts", target=wanted, output_dir="out")
    assert made.promised.ffn_flops <= share + 0.01
    assert made.promised.ffn_flops > share * 0.85  # the next step up would be too slow
    assert said in capfd.readouterr().err


def test_a_speed_beside_what_the_dense_model_would_run_on(calibrated, monkeypatch, capfd):
    """Which may be no slower than the converted model: all that is asked is not to be behind."""
    monkeypatch.setattr(CLOCK, clock(1.25, 0.0, Running("int8", True, "compile", 4)))
    monkeypatch.setattr("d2dmoe_pl.report.writing.measured_times", clock(1.25, 0.0))
    options = {"dtype": "int8", "optimize": True, "against": "compile", "batch_size": 4}
    made = compress("model", "texts", target="speed=1x", output_dir="out", **options)
    assert 0.68 < made.promised.ffn_flops <= 0.8
    assert "x as fast as dense in compile, " in capfd.readouterr().err
    report = (calibrated / "out" / "report.md").read_text()
    assert "x** as fast as dense in compile, a batch of 4, " in report
    assert "in int8, compiled" in report
    assert 'load_model("out/model", optimize=True)' in report
    assert "--artifact out/budget_calibration/artifact " in report
    assert "--dtype int8 --optimize true --compare compile\n" in report


def test_a_lucky_measurement_is_not_chosen():
    """A large budget that came out faster than smaller ones did so by chance."""
    points = tuple(BudgetPoint((tau,), cost, cost, 0.0, 90.0) for tau, cost in ((1.0, 1.0), (0.0, 0.1)))
    path = BudgetPath(("layer",), "dynk_max", "accuracy", True, True, 100, points)

    def measure(budgets, lucky=None):
        return Timing(1.0, 0.0), {each: Timing(0.4 if each == lucky else each, 0.0) for each in budgets}

    plain = budget_for(parse_target("speed=2x"), path, measure)
    assert 0.35 < plain.point.ffn_flops <= 0.5
    found = budget_for(parse_target("speed=2x"), path, partial(measure, lucky=1.0))
    assert found.point.ffn_flops == pytest.approx(plain.point.ffn_flops)
    assert found.times_as_fast == pytest.approx(plain.times_as_fast)


def test_a_machine_too_noisy_to_tell(calibrated, monkeypatch):
    monkeypatch.setattr(CLOCK, clock(1.0, spread=0.3))
    with pytest.raises(ConfigError) as error:
        compress("model", "texts", target="speed=2x", output_dir="out")
    assert str(error.value) == (
        "target='speed=2x': this machine is too noisy to tell, the dense model's times are spread by 30%; stop what "
        "else runs, and run this again: nothing is trained anew"
    )


@pytest.mark.parametrize("dtype", ["int8", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_the_model_is_left_in_its_type(calibrated, capfd, dtype):
    """And tested in it; what it was made from stays as it was, for another wish."""
    made = compress("model", "texts", target="flops=90%", output_dir="out", dtype=dtype)
    model = load_model("out/model")
    assert (made.load().classifier.weight.dtype, model.classifier.weight.dtype) == (getattr(torch, dtype),) * 2
    assert bool(read_artifact("out/model").quantized) == (dtype == "int8")
    assert load_model("out/budget_calibration/artifact").classifier.weight.dtype == torch.float32
    capfd.readouterr()
    for command in (["test"], ["predict", "--output", "predictions.csv"]):
        main([*command, "--run", "out", "--trainer.enable_progress_bar=false", "--trainer.logger=false"])
    assert f"test/loss       {made.test.loss:.4f}" in capfd.readouterr().out
    assert len((calibrated / "predictions.csv").read_text().splitlines()) == 11
    assert compress("model", "texts", target="flops=90%", output_dir="out").load().classifier.weight.dtype.itemsize == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "int4"}, "dtype='int4': allowed are float32, bfloat16, int8"),
        (
            {"against": "tensorrt"},
            "against='tensorrt': allowed are onnxruntime, onnxruntime-int8, openvino, openvino-int8, torch-int8, "
            "compile",
        ),
        ({"target": "speed=1x"}, "target='speed=1x': must be more than 1x, the dense model's speed"),
        (
            {"target": "speed=0x", "against": "compile"},
            "target='speed=0x': must be more than 0x, the dense model's speed",
        ),
    ],
)
def test_what_is_given_is_checked_first(tmp_path, given, said):
    with pytest.raises(ConfigError) as error:
        compress("nowhere", "nowhere.csv", output_dir=tmp_path / "out", **given)
    assert str(error.value) == said
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"^against='openvino': the package openvino is not installed; pip install"):
        compress("nowhere", "nowhere.csv", against="openvino")


def test_a_wish_beside_another_runtime():
    assert parse_target("speed=0.5x", "onnxruntime").value == 0.5
