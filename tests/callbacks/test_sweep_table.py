"""The table of a sweep can be read in a narrow terminal: nothing in it is cut."""

import io

import pytest
import tiny
import torch
from rich.console import Console

from d2dmoe_pl.callbacks.sweep_table import SweepRow, as_table, read_csv, sweep_row, write_csv
from d2dmoe_pl.data import Classification, TextAnswers
from d2dmoe_pl.data.multi_label import MultiLabel
from d2dmoe_pl.data.task import Regression, Task
from d2dmoe_pl.data.token_classification.token_tagging import TokenTagging
from d2dmoe_pl.metrics.expert_load import LayerLoad


def row(flops, metric="matthews_correlation", tau=0.55):
    return SweepRow("test", tau, 0.1234, metric, 91.25, True, True, 12.5, 14.0, flops, 55.5, {})


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize(
    ("flops", "shown"),
    [(70_672.1e6, "70.672"), (1.5e6, "1.500"), (999e3, "999.000"), (2.5e13, "25.000"), (12.0, "12.000")],
)
def test_nothing_is_cut(width, flops, shown):
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(as_table([row(flops), row(flops / 7)], "test, rule dynk_max, router regression"))
    said = out.getvalue()
    assert "…" not in said
    assert shown in said
    assert max(map(len, said.splitlines())) <= width
    for word in ("matthews", "correlation", "experts", "FLOPs", "sample", "0.55", "91.25", "0.1234"):
        assert word in said


@pytest.mark.parametrize(("flops", "unit"), [(7e10, "GFLOPs"), (7e6, "MFLOPs"), (7e12, "TFLOPs"), (7e3, "kFLOPs")])
def test_the_unit_fits_the_size(flops, unit):
    out = io.StringIO()
    Console(file=out, width=100).print(as_table([row(flops)], "test"))
    assert unit in out.getvalue()


@pytest.mark.parametrize(
    ("swept", "settings"), [("tau", [0.1, 1 / 3]), ("budget", [0.25, 1.1]), ("tau", [None]), ("k", [2.0])]
)
def test_rows_come_back_from_their_file(tmp_path, swept, settings):
    task = Classification(["a", "b"])
    layers = {"one": 12.5, "a/b": 1 / 3}
    rows = [
        SweepRow(stage, each, 1 / 7, "accuracy", 91.25, True, True, 12.5, 14.0, 1e9 / 3, 55.5, layers, swept, 400, True)
        for stage in ("validation", "test")
        for each in settings
    ]
    write_csv(rows, tmp_path / "rows.csv")
    assert read_csv(tmp_path / "rows.csv", task) == rows


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Classification(["a", "b"]), 1.5),
        (Classification(["a", "b"], ["f1", "accuracy"]), None),
        (Regression("number"), None),
        (MultiLabel(["a", "b"]), None),
        (TextAnswers(["a"], str), 1.5),
        (TextAnswers(["a"], str, ["chrf"]), None),
        (TokenTagging(["A", "B"]), None),  # words of a text are right or wrong together
        (TokenTagging(["O", "B-A"]), None),
    ],
    ids=lambda value: f"{type(value).__name__} {value.main_metric}" if isinstance(value, Task) else "",
)
def test_the_standard_error_is_of_shares_of_samples_alone(tmp_path, task, expected):
    layers = {"layer": tiny.routed().blocks[0].mlp}
    loads = [LayerLoad(torch.tensor([0] * 8 + [10]), 80.0)]
    made = sweep_row("test", None, 0.1, task, 0.9, layers, loads, samples=400, flops_outside=0)
    write_csv([made], tmp_path / "rows.csv")
    for each in (made, *read_csv(tmp_path / "rows.csv", task)):
        assert each.standard_error == (None if expected is None else pytest.approx(expected))
