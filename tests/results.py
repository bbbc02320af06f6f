"""The README's results: tables and pictures of the recipes that were run on real data, from the files in docs/results.

    python tests/results.py keep minilm_emotion d2dmoe 0 runs/minilm_emotion/router_regression
    python tests/results.py control minilm_emotion 0 runs/minilm_emotion_dense/further_training
    python tests/results.py speed minilm_emotion 0 runs/benchmark/benchmark.csv
    python tests/results.py draw

``keep`` copies what the sweep of one method and seed left, with the dense model's scores; ``control`` notes those of a
dense model trained on for as long as D2DMoE and its recovery, without a penalty; ``speed`` copies a benchmark of the
model that the first method in the table left with one seed; ``draw`` writes README and pictures. How many experts a
token runs is chosen on the validation split, for each budget anew: the setting with the best score among those that
cost no more. What is shown is that setting's score on the test split.
"""

import csv
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COSTS = {"ffn_flops_percent": "FFN FLOPs", "model_flops_percent": "whole model's FLOPs"}
TICKS = [3, 4, 5, 7, 10, 15, 20, 30, 50, 100]
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


RESULTS = [
    Results(
        "minilm_emotion",
        {"ffn_flops_percent": [3, 4, 5, 7, 9, 11, 14, 18, 25], "model_flops_percent": [37, 38, 40, 43, 46, 51]},
    ),
    Results(
        "cifar10_vit",
        {"ffn_flops_percent": [6, 8, 10, 12, 15, 20, 25, 35], "model_flops_percent": [25, 30, 35, 40, 44, 46, 50, 60]},
    ),
]


def read(file: Path) -> list[Row]:
    """The records of a CSV file."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def setting(row: Row) -> str:
    """Which ``tau`` or ``k`` a row is of; empty for a routing that has neither."""
    return row.get("tau") or row.get("k") or ""


def chosen(rows: Sequence[Row], cost: str, budget: float) -> Row | None:
    """The test row of the setting with the best validation accuracy within ``budget``, and of equal ones the cheapest.

    None if all cost more.
    """
    affordable = [row for row in rows if row["stage"] == "validation" and float(row[cost]) <= budget]
    if not affordable:
        return None
    best = max(affordable, key=lambda row: (float(row["accuracy"]), -float(row[cost])))
    return next(row for row in rows if row["stage"] == "test" and setting(row) == setting(best))


def spread(values: Sequence[float]) -> str:
    """Mean, with the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def cell(runs: Sequence[Sequence[Row]], cost: str, budget: float) -> str:
    """Accuracy of one method within one budget; empty unless every seed has a setting within it."""
    rows = [chosen(rows, cost, budget) for rows in runs]
    return "" if None in rows else spread([float(row["accuracy"]) for row in rows])


def table(runs: Mapping[str, Sequence[Sequence[Row]]], cost: str, budgets: Sequence[float]) -> list[str]:
    """Accuracy by label and budget, as lines of Markdown."""
    lines = [
        f"| {COSTS[cost]}, at most | seeds | {' | '.join(f'{budget:g}%' for budget in budgets)} |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for label, seeds in runs.items():
        cells = [cell(seeds, cost, budget) for budget in budgets]
        lines.append(f"| {label} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def ablations(results: Results) -> list[str]:
    """What one other setting does, as lines of Markdown; nothing where none was tried."""
    runs: dict[str, list[list[Row]]] = {}
    for method, settings in ABLATIONS.items():
        for name, label in settings.items():
            for file in sorted(results.folder.glob(f"{name}-?.csv")):
                seed = file.stem[-1]
                runs.setdefault(f"{LABELS[method]}, seed {seed}", [results.run(method, seed)])
                runs[f"- {label}"] = [read(file)]
    cost = next(iter(results.budgets))
    return ["With one other setting:", "", *table(runs, cost, results.budgets[cost])] if runs else []


def speeds(results: Results) -> list[str]:
    """What the clock says beside what the FLOPs promise, as lines of Markdown; nothing where it was not measured."""
    file = next(results.folder.glob("speed-*.csv"), None)
    if file is None:
        return []
    seed = file.stem.removeprefix("speed-")
    name = next(name for name in LABELS if (results.folder / f"{name}-{seed}.csv").is_file())
    rows = results.run(name, seed)
    swept = {float(row["tau"]): row for row in rows if row["stage"] == "test"}
    timed = [row for row in read(file) if row["scope"] == "model" and row["router"] == "True"]
    shapes = list(dict.fromkeys((row["dtype"], row["batch_size"]) for row in timed))
    at = {(row["dtype"], row["batch_size"], float(row["tau"])): row for row in timed}
    header = [f"{LABELS[name]}, seed {seed}", "accuracy, %", "whole model's FLOPs, %", "speed-up they promise"]
    header += [f"{dtype}, batch of {batch_size}" for dtype, batch_size in shapes]
    dense = [_milliseconds(next(at[key] for key in at if key[:2] == shape), "dense") for shape in shapes]
    lines = ["And on the clock, routers in:", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines.append(f"| dense | | | | {' | '.join(dense)} |")
    for tau in dict.fromkeys(float(row["tau"]) for row in timed):
        share = float(swept[tau]["model_flops_percent"])
        cells = [f"tau {tau:g}", f"{float(swept[tau]['accuracy']):.2f}", f"{share:.1f}", f"{100 / share:.2f}x"]
        rows = [at[(*shape, tau)] for shape in shapes]
        cells += [f"{float(row['speed_up']):.2f}x: {_milliseconds(row, 'moe')}" for row in rows]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _milliseconds(row: Row, way: str) -> str:
    median, deviation = float(row[f"{way}_ms"]), float(row[f"{way}_spread_ms"])
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ± {deviation:.{digits}f} ms"


def section(results: Results) -> str:
    """What the README says of one recipe: tables and picture."""
    dense, control = results.scores("dense"), results.scores("control")
    trained_on = "trained on for as many epochs as D2DMoE and its recovery, without a penalty"
    parts = [
        [
            f"Accuracy on the test split in percent; dense, after `FineTuning`: {spread(dense)} ({_seeds(len(dense))})"
            + (f"; {trained_on}: {spread(control)} ({_seeds(len(control))})." if control else ".")
        ],
        *(table(results.runs(), cost, budgets) for cost, budgets in results.budgets.items()),
        [f"![Accuracy against cost](docs/results/{results.recipe}/results.png)"],
        ablations(results),
        speeds(results),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def picture(results: Results) -> Figure:
    """Accuracy against both costs on the test split, all methods in one plot, with a band from worst to best seed."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    dense, control = statistics.mean(results.scores("dense")), results.scores("control")
    for axes, (cost, name) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label=f"dense: {dense:.2f}%")
        if control:
            level = statistics.mean(control)
            axes.axhline(level, color="grey", linestyle=":", linewidth=1, label=f"dense, trained on: {level:.2f}%")
        best = max([dense, *control])
        for i, (method, runs) in enumerate(results.runs().items()):
            points: dict[str, list[tuple[float, float]]] = {}
            for row in (row for rows in runs for row in rows if row["stage"] == "test"):
                points.setdefault(setting(row), []).append((float(row[cost]), float(row["accuracy"])))
            pairs = [tuple(zip(*found, strict=True)) for found in points.values()]  # (costs, accuracies) of a setting
            curve = sorted((statistics.mean(x), statistics.mean(y), min(y), max(y)) for x, y in pairs)
            x, mean, low, high = zip(*curve, strict=True)
            label = f"{method} ({_seeds(len(runs))})"
            axes.plot(x, mean, marker="o", markersize=3, color=f"C{i}", label=label)
            axes.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
            best = max(best, *high)
        axes.set_xlabel(f"{name}, % of dense (router included)")
        if cost == "ffn_flops_percent":  # where the cheap settings lie close together
            axes.set_xscale("log")
            left, right = axes.get_xlim()
            axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.set_xlim(left, right)
            axes.minorticks_off()
        axes.set_ylim(dense - 12, best + 1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def markers(results: Results) -> tuple[str, str]:
    """Between which the README has the section."""
    return (
        f"<!-- results of {results.recipe}: python tests/results.py draw writes them -->",
        f"<!-- end of the results of {results.recipe} -->",
    )


def placed(text: str) -> str:
    """``text`` with each section between its markers."""
    for results in RESULTS:
        begin, end = markers(results)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{section(results)}\n{end}{after}"
    return text


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


def draw() -> None:
    """Write the README's sections and the pictures."""
    README.write_text(placed(README.read_text()))
    for results in RESULTS:
        picture(results).savefig(results.folder / "results.png", dpi=120)


if __name__ == "__main__":
    {"keep": keep, "control": control, "speed": speed, "draw": draw}[sys.argv[1]](*sys.argv[2:])
