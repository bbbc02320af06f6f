"""What was measured with recipes that were run on real data: the files in docs/results, and how they get there."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LABELS = {
    "d2dmoe_recovery": "D2DMoE, then recovery",
    "d2dmoe": "D2DMoE",
    "d2dmoe_projections_recovery": "D2DMoE with projections, then recovery",
    "d2dmoe_projections": "D2DMoE with projections",
    "moefication": "MoEfication",
    "moebert": "MoEBERT",
}
# by the method that each differs from in one setting
ABLATIONS = {
    "d2dmoe": {
        "split_parameter": "experts split by weights",
        "width_128": "routers of 128 neurons",
        "width_64": "routers of 64 neurons",
        "width_8": "routers of 8 neurons",
        "penalty_l1": "L1 penalty",
        "alpha_1e-3": "half the penalty, alpha 1e-3",
    },
    "d2dmoe_recovery": {
        "alpha_1e-3_recovery": "half the penalty before it",
        "router_lr_1e-3": "routers at a learning rate of 1e-3, not the model's 1e-4",
        "router_lr_3e-4": "routers at the model's learning rate, 3e-4, not 2e-3",
    },
}
METHODS = [*LABELS, *(name for settings in ABLATIONS.values() for name in settings)]
Row = Mapping[str, str]


@dataclass
class Results:
    """What was measured with one recipe and its twins.

    Attributes:
        recipe: Its name, and that of its folder in ``docs/results``.
        budgets: Of each cost in percent of dense, the most that a model may cost in a column of the table.
    """

    recipe: str
    budgets: Mapping[str, Sequence[float]]

    @property
    def folder(self) -> Path:
        return ROOT / "docs" / "results" / self.recipe

    def scores(self, name: str) -> list[float]:
        """Test accuracy in percent of each seed's ``dense`` model or ``control``; none if not measured."""
        file = self.folder / f"{name}.csv"
        return [100 * float(row["test"]) for row in read(file)] if file.is_file() else []

    def runs(self) -> dict[str, list[list[Row]]]:
        """By method, the rows of the sweep of each seed."""
        found = {label: sorted(self.folder.glob(f"{name}-?.csv")) for name, label in LABELS.items()}
        return {label: [read(file) for file in files] for label, files in found.items() if files}

    def run(self, name: str, seed: str) -> list[Row]:
        """The rows of the sweep of one seed."""
        return read(self.folder / f"{name}-{seed}.csv")


def read(file: Path) -> list[Row]:
    """The records of a CSV file."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def keep(recipe: str, method: str, seed: str, phase_folder: str) -> None:
    """Copy what a sweep left, and note the dense model's scores of that seed."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    sweep = Path(phase_folder) / "tau_sweep.csv"
    if {row["stage"] for row in read(sweep)} != {"validation", "test"}:
        raise ValueError(f"phase_folder={phase_folder!r}: no sweep of validation and test; let the chain finish")
    folder = Results(recipe, {}).folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep, folder / f"{method}-{seed}.csv")
    _note(recipe, "dense", seed, Path(phase_folder).parent / "fine_tuning")


def control(recipe: str, seed: str, phase_folder: str) -> None:
    """Note the scores of a dense model that was trained on."""
    _note(recipe, "control", seed, Path(phase_folder))


def _note(recipe: str, name: str, seed: str, phase_folder: Path) -> None:
    """The scores that a phase ended with, into a file of such models' scores by seed."""
    config = json.loads((phase_folder / "artifact" / "config.json").read_text())
    scores = config["d2dmoe"]["history"][-1]["metrics"]
    file = Results(recipe, {}).folder / f"{name}.csv"
    known = {row["seed"]: row for row in read(file)} if file.is_file() else {}
    known[seed] = {"seed": seed, **{split: scores[f"{split}/accuracy"] for split in ("validation", "test")}}
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ["seed", "validation", "test"])
        writer.writeheader()
        writer.writerows(known[seed] for seed in sorted(known))


def speed(recipe: str, seed: str, benchmark: str) -> None:
    """Copy what a benchmark left, of the model that the first method in the table left with ``seed``."""
    shutil.copy(benchmark, Results(recipe, {}).folder / f"speed-{seed}.csv")
