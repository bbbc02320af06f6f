"""The pages' results: tables and pictures of the recipes that were run on real data, from the files in docs/results.

    python tests/results.py keep minilm_emotion d2dmoe 0 runs/minilm_emotion/router_regression
    python tests/results.py control minilm_emotion 0 runs/minilm_emotion_dense/further_training
    python tests/results.py promise minilm_emotion 0 runs/minilm_emotion/budget_calibration
    python tests/results.py speed minilm_emotion 0 runs/benchmark/benchmark.csv
    python tests/results.py draw

``keep`` copies what the sweep of one method and seed left, with the dense model's scores; ``control`` notes those of a
dense model trained on for as long as D2DMoE and its recovery, without a penalty; ``promise`` notes what a calibrated
model said of its budgets, and what came of it; ``speed`` copies a benchmark of the model that the first method in the
table left with one seed; ``draw`` writes docs/results.md, the tables of the README and docs/budgets.md, and the
pictures. How many experts a token runs is chosen on the validation split, for each budget anew: the setting with the
best score among those that cost no more; a model that is set to budgets is set to that one. What is shown is the score
on the test split.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from result_files import ABLATIONS, LABELS, ROOT, Results, Row, control, keep, promise, read, speed

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
BUDGETS_PAGE = ROOT / "docs" / "budgets.md"
COSTS = {"ffn_flops_percent": "FFN FLOPs", "model_flops_percent": "whole model's FLOPs"}
TICKS = [3, 4, 5, 7, 10, 15, 20, 30, 50, 100]
HEADLINE = [4, 7, 11, 18, 25]  # budgets of the README's table, which is of the first of RESULTS
STEPS = ("d2dmoe_recovery", "d2dmoe_budgets")  # on the way, which it leaves out
HEADLINE_MARKERS = (
    "<!-- the headline: python tests/results.py draw writes it -->",
    "<!-- end of the headline -->",
)
PROMISED = {  # budgets of the table in docs/budgets.md
    "minilm_emotion": [0.04, 0.07, 0.11, 0.18],
    "cifar10_vit": [0.08, 0.12, 0.2, 0.35],
    "digits_vit": [0.12, 0.15, 0.25, 0.5],
}
PROMISED_MARKERS = (
    "<!-- promises: python tests/results.py draw writes them -->",
    "<!-- end of the promises -->",
)
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


def setting(row: Row) -> str:
    """Which ``tau``, ``k`` or budget a row is of; empty for a routing that has none."""
    return row.get("tau") or row.get("k") or row.get("budget") or ""


def price(row: Row, cost: str) -> float:
    """What a setting costs; a budget costs what it says, though not to the last digit."""
    is_asked = "budget" in row and cost == "ffn_flops_percent"
    return round(100 * float(row["budget"]), 6) if is_asked else float(row[cost])


def chosen(rows: Sequence[Row], cost: str, budget: float) -> Row | None:
    """The test row of the setting with the best validation accuracy within ``budget``, and of equal ones the cheapest.

    Of a model that is set to budgets, that of the dearest within ``budget``: it needs no choice. None if all cost more.
    """
    affordable = [row for row in rows if row["stage"] == "validation" and price(row, cost) <= budget]
    if not affordable:
        return None
    if "budget" in affordable[0]:
        best = max(affordable, key=lambda row: price(row, cost))
    else:
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


def promises() -> str:
    """What budgets were said to give, and gave, by recipe and budget."""
    header = ("recipe", "FFN FLOPs", "cost off, relative", "promised, %", "test split, %", "apart, in standard errors")
    header += ("loss promised, points", "loss")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for recipe, budgets in PROMISED.items():
        rows = Results(recipe, {}).promises()
        for budget in budgets:
            of_budget = [row for row in rows if abs(float(row["budget"]) - budget) < 1e-9]
            keys = ("promised", "accuracy", "promised_with_all", "accuracy_with_all")
            said, came, said_of_all, came_of_all = ([float(row[key]) for row in of_budget] for key in keys)
            apart = [(a - b) / float(row["standard_error"]) for a, b, row in zip(came, said, of_budget, strict=True)]
            off = max(abs(float(row["ffn_flops_percent"]) / (100 * budget) - 1) for row in of_budget)
            signed = ", ".join(f"{each:+.1f}" for each in apart)
            losses = [
                spread([a - b for a, b in zip(every, of_some, strict=True)])
                for every, of_some in ((said_of_all, said), (came_of_all, came))
            ]
            cells = [f"`{recipe}`", f"{100 * budget:g}%", f"{100 * off:.1f}%", spread(said), spread(came), signed]
            lines.append(f"| {' | '.join([*cells, *losses])} |")
    return "\n".join(lines)


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
    swept = {float(setting(row)): row for row in rows if row["stage"] == "test"}
    whole = [row for row in read(file) if row["scope"] == "model"]
    timed = [row for row in whole if row["router"] == "True"]
    shapes = list(dict.fromkeys((row["dtype"], row["batch_size"]) for row in timed))
    at = {(row["dtype"], row["batch_size"], float(setting(row))): row for row in timed}
    header = [f"{LABELS[name]}, seed {seed}", "accuracy, %", "whole model's FLOPs, %", "speed-up they promise"]
    header += [f"{dtype}, batch of {batch_size}" for dtype, batch_size in shapes]
    dense = {(row["dtype"], row["batch_size"]): _time(row, "dense") for row in timed if row["dtype"] == "float32"}
    dense |= {(row["dtype"], row["batch_size"]): _time(row, "moe") for row in whole if row["backend"] == "PyTorch"}
    lines = ["And on the clock, routers in:", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines.append(f"| dense, in each type | | | | {' | '.join(_milliseconds(*dense[shape]) for shape in shapes)} |")
    for each in dict.fromkeys(float(setting(row)) for row in timed):
        share = float(swept[each]["model_flops_percent"])
        called = f"{100 * each:g}% of FFN FLOPs" if "budget" in swept[each] else f"tau {each:g}"
        cells = [called, f"{float(swept[each]['accuracy']):.2f}", f"{share:.1f}", f"{100 / share:.2f}x"]
        for shape in shapes:
            own = _time(at[(*shape, each)], "moe")
            cells.append(f"{dense[shape][0] / own[0]:.2f}x: {_milliseconds(*own)}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _time(row: Row, way: str) -> tuple[float, float]:
    """Median and spread, milliseconds."""
    return float(row[f"{way}_ms"]), float(row[f"{way}_spread_ms"])


def _milliseconds(median: float, deviation: float) -> str:
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ± {deviation:.{digits}f} ms"


def section(results: Results) -> str:
    """What docs/results.md says of one recipe: tables and picture."""
    dense, control = results.scores("dense"), results.scores("control")
    trained_on = "trained on for as many epochs as D2DMoE and its recovery, without a penalty"
    parts = [
        [
            f"Accuracy on the test split in percent; dense, after `FineTuning`: {spread(dense)} ({_seeds(len(dense))})"
            + (f"; {trained_on}: {spread(control)} ({_seeds(len(control))})." if control else ".")
        ],
        *(table(results.runs(), cost, budgets) for cost, budgets in results.budgets.items()),
        [f"![Accuracy against cost](results/{results.recipe}/results.png)"],
        ablations(results),
        speeds(results),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def headline() -> str:
    """What the README says: the first table of the first of ``RESULTS``, with fewer rows and columns."""
    dense = RESULTS[0].scores("dense")
    said = f"Accuracy on the test split in percent; the dense model has {spread(dense)} ({_seeds(len(dense))})."
    runs = {label: runs for label, runs in RESULTS[0].runs().items() if label not in map(LABELS.get, STEPS)}
    return "\n".join([said, "", *table(runs, "ffn_flops_percent", HEADLINE)])


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
    """Between which the page has the section."""
    return (
        f"<!-- results of {results.recipe}: python tests/results.py draw writes them -->",
        f"<!-- end of the results of {results.recipe} -->",
    )


def placed(text: str, between: tuple[str, str], content: str) -> str:
    """``text`` with ``content`` between its two markers."""
    begin, end = between
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def page(text: str) -> str:
    """The text of docs/results.md with each section between its markers."""
    for results in RESULTS:
        text = placed(text, markers(results), section(results))
    return text


def readme(text: str) -> str:
    """The README's text with its table."""
    return placed(text, HEADLINE_MARKERS, headline())


def budgets_page(text: str) -> str:
    """The text of docs/budgets.md with its table."""
    return placed(text, PROMISED_MARKERS, promises())


def draw() -> None:
    """Write the pages with their tables, and the pictures."""
    for path, made in ((PAGE, page), (README, readme), (BUDGETS_PAGE, budgets_page)):
        path.write_text(made(path.read_text()))
    for results in RESULTS:
        picture(results).savefig(results.folder / "results.png", dpi=120)


if __name__ == "__main__":
    {"keep": keep, "control": control, "promise": promise, "speed": speed, "draw": draw}[sys.argv[1]](*sys.argv[2:])
