"""What was measured with recipes that were run on real data: the files in docs/results, and how they get there."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2dmoe_pl.moe.budgets.budget_path import path_from_json

ROOT = Path(__file__).parents[1]
LABELS = {
    "d2dmoe_recovery_budgets": "D2DMoE, recovery, budgets",
    "d2dmoe_recovery": "D2DMoE, recovery",
    "d2dmoe_budgets": "D2DMoE, stand-ins, budgets",
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

    def promises(self) -> list[Row]:
        """What calibrated models were said to do at each budget, and did, by seed; none if not measured."""
        file = self.folder / "promises.csv"
        return read(file) if file.is_file() else []

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
    row = {"seed": seed, **{split: scores[f"{split}/accuracy"] for split in ("validation", "test")}}
    _write(recipe, name, seed, [row])


def promise(recipe: str, seed: str, phase_folder: str) -> None:
    """Note what a calibrated model said of each budget that a sweep tried, and what it then did on the test split."""
    config = json.loads((Path(phase_folder) / "artifact" / "config.json").read_text())
    path = path_from_json(config["d2dmoe"]["budgets"])
    before = [Path(phase_folder).parent / phase / "tau_sweep.csv" for phase in ("recovery_tuning", "router_regression")]
    swept = read(next(file for file in before if file.is_file()))
    dense = next(row["accuracy"] for row in swept if row["stage"] == "test" and float(row["tau"]) == 1)
    rows = []
    for row in read(Path(phase_folder) / "tau_sweep.csv"):
        if row["stage"] == "test":
            point = path.at_cost("ffn_flops", float(row["budget"]))
            found = {"promised": point.score, "standard_error": path.standard_error(point.score)}
            found |= {"accuracy": float(row["accuracy"]), "ffn_flops_percent": float(row["ffn_flops_percent"])}
            found |= {"promised_with_all": path.dense.score, "accuracy_with_all": float(dense)}
            rows.append({"seed": seed, "budget": row["budget"], **{key: f"{found[key]:.4f}" for key in found}})
    _write(recipe, "promises", seed, rows)


def _write(recipe: str, name: str, seed: str, rows: Sequence[Row]) -> None:
    """Put a seed's rows into a file of all seeds."""
    file = Results(recipe, {}).folder / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    others = [row for row in read(file) if row["seed"] != seed] if file.is_file() else []
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(sorted([*others, *rows], key=lambda row: row["seed"]))


def speed(recipe: str, seed: str, benchmark: str) -> None:
    """Copy what a benchmark left, of the model that the first method in the table left with ``seed``."""
    shutil.copy(benchmark, Results(recipe, {}).folder / f"speed-{seed}.csv")
