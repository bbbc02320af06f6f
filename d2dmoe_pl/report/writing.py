"""A report is made from what is in the folder of a chain, and from its last phase as it is in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from d2dmoe_pl.benchmark.machine import this_machine
from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.callbacks.sweep_table import SweepRow, read_csv
from d2dmoe_pl.evaluation_mode import evaluating
from d2dmoe_pl.moe.budgets.budget_path import BudgetPoint, budget_path, set_taus_
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.phases import BudgetCalibration, Phase
from d2dmoe_pl.report.findings import Findings, phase_findings
from d2dmoe_pl.report.measured_speed import Running, dense_twin, measured_times, timed_batches
from d2dmoe_pl.report.page import as_html, as_markdown
from d2dmoe_pl.report.single_samples import expert_loads, single_samples
from d2dmoe_pl.whole_files import replaced_file

HTML, MARKDOWN = "report.html", "report.md"
SAMPLES = 6  # that are shown
LOAD_SAMPLES = 128


def write_report(
    folder: Path,
    seconds: Mapping[str, float],
    phase: Phase,
    asked: str | None = None,
    promised: BudgetPoint | None = None,
    measured: Sequence[SweepRow] = (),
    running: Running | None = None,
    dense: nn.Module | None = None,
) -> Path:
    """Write ``report.html`` and ``report.md`` into the folder of a chain.

    Args:
        folder: Of the chain.
        seconds: What its phases took, by name, first to last, all finished; NaN where that is not known.
        phase: The last one, with its model and data, which is set up.
        asked: What was asked for, in words; the budget of ``BudgetCalibration`` if that is last, and nothing is given.
        promised: The budget that does that.
        measured: On the test split: at that budget, and with every expert on.
        running: How the model is timed, and beside what.
        dense: That it was made from; its own weights in the order of a dense model if not given.

    Returns:
        The page.
    """
    sweep = folder / list(seconds)[-1] / "tau_sweep.csv"
    rows = read_csv(sweep, phase.task) if sweep.is_file() else []
    test, dense_test = (measured[0], measured[-1]) if measured else (None, None)
    path = budget_path(phase.model)
    if promised is None and path is not None and isinstance(phase, BudgetCalibration):
        asked = f"ffn_flops={100 * phase.ffn_flops:g}%"
        promised = path.at_cost("ffn_flops", max(phase.ffn_flops, path.points[-1].ffn_flops))
        test = next((row for row in rows if row.stage == "test" and row.setting == phase.ffn_flops), None)
    running = running or Running()
    has_experts = bool(expert_layers(phase.model))
    times, timed = _times(phase, promised, running, dense) if has_experts else ({}, "")
    found = Findings(
        folder,
        asked,
        phase.task.main_metric,
        phase_findings(folder, seconds, phase.task.main_metric),
        rows,
        path,
        promised,
        test,
        dense_test,
        times,
        timed,
        str(this_machine(torch.device("cpu"))) if times else "",
        single_samples(phase, SAMPLES) if has_experts else (),
        expert_loads(phase, LOAD_SAMPLES) if has_experts else {},
        phase.task.writes_rows,
        running,
    )
    for name, text in ((HTML, as_html(found)), (MARKDOWN, as_markdown(found))):
        with replaced_file(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return folder / HTML


@rank_zero_only
def discard_report(folder: Path) -> None:
    """Take a report away that is of an earlier run of a chain's phases."""
    for name in (HTML, MARKDOWN):
        (folder / name).unlink(missing_ok=True)


def _times(
    phase: Phase, promised: BudgetPoint | None, running: Running, dense: nn.Module | None
) -> tuple[Mapping[float | None, Timing], str]:
    """Times of a batch of test samples at some budgets beside dense, and what they are of."""
    path = budget_path(phase.model)
    if path is None or phase.device.type != "cpu":
        return {}, ""
    batches = timed_batches(phase.model, phase.data, running.batch_size)
    if not batches:
        return {}, ""
    least = path.points[-1].ffn_flops
    own = [] if promised is None else [promised.ffn_flops]
    budgets = sorted({*own, *(budget for budget in (least, 0.1, 0.25, 0.5) if budget >= least)})
    with evaluating(phase.model):
        dense = dense or dense_twin(phase.model)
        of_dense, times = measured_times(phase.model, dense, batches, budgets, running)
    if promised is not None:
        set_taus_(phase.model, path, promised.taus)
    by_budget: dict[float | None, Timing] = {None: of_dense}
    by_budget |= times  # type: ignore[arg-type] # none of them is None
    return by_budget, running.said_of(batches)
