"""What is found in the folder of a chain: its phases, their curves and times, and how the last one's model behaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.callbacks.save_artifact import FOLDER
from d2dmoe_pl.callbacks.sweep_table import SweepRow
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint
from d2dmoe_pl.report.measured_speed import Running
from d2dmoe_pl.report.single_samples import SampleCompute

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class PhaseFinding:
    """One phase of a chain.

    Attributes:
        name: In the recipe.
        kind: Its class.
        seconds: That it took, its test included; NaN if that is not known.
        metrics: On validation and test, by name.
        loss: Training loss over steps.
        validation: The main metric on the validation split over steps, where it was followed.
    """

    name: str
    kind: str
    seconds: float
    metrics: Mapping[str, float]
    loss: Curve = ()
    validation: Curve = ()


@dataclass(frozen=True)
class Findings:
    """All of a chain.

    Attributes:
        folder: Of the chain.
        asked: What was asked for, in words; None for a chain that nobody asked anything of.
        metric: Name of the task's main metric.
        phases: First to last.
        rows: Of the last phase's sweep, of all splits.
        path: The last model's budgets; None if it has none.
        promised: The budget that was asked for, as the validation split says; None if there is none.
        test: The same on the test split.
        dense_test: With every expert on, on the test split.
        times: Seconds of a batch, of the dense model under None, and at budgets.
        timed: What the times are of, in words.
        machine: That they were measured on.
        samples: Where compute goes.
        loads: The share of tokens that run each expert, by layer.
        predicts: Whether ``predict`` writes what the model gives, as it does not for language models.
        running: How times were taken.
    """

    folder: Path
    asked: str | None
    metric: str
    phases: Sequence[PhaseFinding]
    rows: Sequence[SweepRow]
    path: BudgetPath | None = None
    promised: BudgetPoint | None = None
    test: SweepRow | None = None
    dense_test: SweepRow | None = None
    times: Mapping[float | None, Timing] = field(default_factory=dict)
    timed: str = ""
    machine: str = ""
    samples: Sequence[SampleCompute] = ()
    loads: Mapping[str, Sequence[float]] = field(default_factory=dict)
    predicts: bool = True
    running: Running = field(default_factory=Running)


def phase_findings(folder: Path, seconds: Mapping[str, float], metric: str) -> list[PhaseFinding]:
    """What the phases of a chain left in its folder.

    Args:
        folder: Of the chain.
        seconds: What its phases took, by name, first to last.
        metric: Name of the task's main metric.
    """
    return [_phase_finding(folder / name, took, metric) for name, took in seconds.items()]


def _phase_finding(folder: Path, seconds: float, metric: str) -> PhaseFinding:
    history = read_artifact(folder / FOLDER).history
    curves: dict[str, dict[int, float]] = {"train/loss": {}, f"validation/{metric}": {}}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 500}).Reload()
        for tag in curves.keys() & set(events.Tags()["scalars"]):
            curves[tag] |= {scalar.step: scalar.value for scalar in events.Scalars(tag)}
    loss, validation = (sorted(curve.items()) for curve in curves.values())
    return PhaseFinding(folder.name, history[-1].phase, seconds, history[-1].metrics, loss, validation)
