"""The pictures of a report, as SVG."""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.callbacks.sweep_table import SweepRow
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint
from d2dmoe_pl.report.findings import PhaseFinding
from d2dmoe_pl.report.single_samples import SampleCompute

WIDTH = 7.0  # inches
COLOURS = ("#1f6feb", "#d1490c", "#2da44e", "#8250df")


def as_svg(figure: Figure) -> str:
    """A figure as an SVG element, its words as words, the same for the same figure."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "d2dmoe_pl"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _figure(height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def curve(
    rows: Sequence[SweepRow], path: BudgetPath | None, chosen: BudgetPoint | None, test: SweepRow | None, label: str
) -> Figure:
    """The metric against FFN FLOPs, with its standard error, and what was asked for.

    Args:
        rows: Of a sweep, of all splits.
        path: Budgets, by the validation split.
        chosen: The one that was asked for.
        test: What it is on the test split.
        label: Of the metric.
    """
    figure, axes = _figure(4.0)
    axis = axes[0, 0]
    for colour, stage in zip(cycle(COLOURS), dict.fromkeys(row.stage for row in rows), strict=False):
        of_stage = sorted((row for row in rows if row.stage == stage), key=lambda row: row.ffn_flops_percent)
        axis.errorbar(
            [row.ffn_flops_percent for row in of_stage],
            [row.score for row in of_stage],
            yerr=[row.standard_error or 0.0 for row in of_stage],
            color=colour,
            marker="o",
            markersize=3,
            capsize=2,
            label=stage,
        )
    if path is not None:
        way = sorted((100 * point.ffn_flops, point.score) for point in path.points)
        axis.plot(*zip(*way, strict=True), color="0.5", linewidth=1, label="validation, all budgets")
    if path is not None and chosen is not None:
        asked = 100 * chosen.ffn_flops
        axis.axvline(asked, color="0.4", linestyle=":", label=f"set to {asked:.1f}%")
        axis.axhline(path.dense.score, color="0.4", linestyle="--", linewidth=1, label="dense, validation")
    if test is not None:
        axis.plot(
            [test.ffn_flops_percent], [test.score], marker="*", markersize=13, color=COLOURS[3], label="this, test"
        )
    axis.set_xscale("log")
    ticks = [
        tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100) if tick >= min(row.ffn_flops_percent for row in rows) * 0.7
    ]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("FFN FLOPs, % of dense")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def layers(rows: Sequence[SweepRow]) -> Figure:
    """Experts run by each layer at each setting."""
    names = list(rows[0].layers)
    shares = np.array([[max(row.layers[name], 1e-3) for row in rows] for name in names])  # (layers, settings)
    figure, axes = _figure(1.2 + 0.28 * len(names))
    axis = axes[0, 0]
    least = min(max(shares.min(), 0.1), 10)  # a range of colours, also where every layer runs all its experts
    image = axis.imshow(shares, aspect="auto", cmap="viridis", norm=LogNorm(vmin=least, vmax=100))
    for (i, j), share in np.ndenumerate(shares):
        axis.text(
            j,
            i,
            f"{share:.0f}" if share >= 10 else f"{share:.1f}",
            ha="center",
            va="center",
            fontsize=7,
            color="w" if share < 30 else "k",
        )
    axis.set_xticks(range(len(rows)), ["-" if row.setting is None else f"{row.setting:.3g}" for row in rows])
    axis.set_yticks(range(len(names)), [shortened(name) for name in names])
    axis.set_xlabel(rows[0].swept)
    figure.colorbar(image, label="experts run, %")
    return figure


def loads(shares: Mapping[str, Sequence[float]]) -> Figure:
    """How many tokens run each expert, the busiest first; a line a layer.

    Args:
        shares: Of tokens, by layer and expert.
    """
    figure, axes = _figure(2.8)
    axis = axes[0, 0]
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(shares)))
    for colour, (name, own) in zip(colours, shares.items(), strict=True):
        axis.plot([100 * share for share in sorted(own, reverse=True)], color=colour, label=shortened(name))
    axis.set_xlabel("experts, the busiest first")
    axis.set_ylabel("% of tokens")
    axis.grid(alpha=0.3)
    if len(shares) <= 12:
        axis.legend(fontsize=7)
    return figure


def shortened(name: str, longest: int = 22) -> str:
    """The end of a layer's name."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def courses(phases: Sequence[PhaseFinding]) -> Figure | None:
    """Training losses, and the metric where it was followed, of the phases that train."""
    trained = [phase for phase in phases if len(phase.loss) > 1]
    if not trained:
        return None
    rows = ceil(len(trained) / 2)
    figure, axes = _figure(2.2 * rows, 2, rows)
    for axis, phase in zip(axes.flat, trained, strict=False):
        axis.plot(*zip(*phase.loss, strict=True), color=COLOURS[0], linewidth=1)
        axis.set_title(phase.name, fontsize=9, parse_math=False)
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
        if min(value for _, value in phase.loss) > 0:
            axis.set_yscale("log")
        if len(phase.validation) > 1:
            other = axis.twinx()
            other.plot(*zip(*phase.validation, strict=True), color=COLOURS[1], linewidth=1)
            other.set_ylabel("validation", color=COLOURS[1])
    for axis in axes.flat[len(trained) :]:
        axis.set_axis_off()
    return figure


def speeds(times: Mapping[float | None, Timing], rival: str) -> Figure:
    """Times beside the dense model's."""
    figure, axes = _figure(0.7 + 0.3 * len(times))
    axis = axes[0, 0]
    names = [rival if budget is None else f"{100 * budget:.3g}% of FFN FLOPs" for budget in times]
    medians = [1000 * timing.median for timing in times.values()]
    spreads = [1000 * timing.spread for timing in times.values()]
    colours = ["0.6" if budget is None else COLOURS[0] for budget in times]
    axis.barh(range(len(names)), medians, xerr=spreads, color=colours, capsize=2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    return figure


def pictures(samples: Sequence[SampleCompute]) -> Figure:
    """Pictures, each beside the share of experts that its patches run."""
    rows = len(samples)
    figure, axes = _figure(1.7 * ceil(rows / 3), 6, ceil(rows / 3))
    largest = max(np.max(sample.shares) for sample in samples)
    for axis in axes.flat:
        axis.set_axis_off()
    for (one, other), sample in zip(axes.reshape(-1, 2), samples, strict=False):
        assert sample.picture is not None
        one.imshow(sample.picture.numpy(), cmap="gray")
        grid = np.array(sample.shares)  # (rows, columns)
        other.imshow(100 * grid, cmap="magma", vmin=0, vmax=100 * largest)
        one.set_title(sample.said, fontsize=7, loc="left", parse_math=False)  # a label may have any signs
        other.set_title(f"{100 * grid.mean():.1f}% of experts", fontsize=7, loc="left")
    return figure


def drawn_or_none(draw: Callable[..., Figure | None], *given: Any) -> str:
    """A figure as SVG; nothing where there is none to draw."""
    figure = draw(*given)
    return "" if figure is None else as_svg(figure)
