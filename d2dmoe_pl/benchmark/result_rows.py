"""The rows of a benchmark, and the ways to show them: a CSV, tables, a picture."""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE
from rich.table import Table

from d2dmoe_pl.benchmark.machine import Machine
from d2dmoe_pl.whole_files import replaced_file

ENOUGH = 0.5  # of a score's points that may be lost
PYTORCH = "PyTorch"
TITLES = {"layer": "FFN alone", "model": "whole model", "decode": "writing"}


@dataclass
class BenchmarkRow:
    """One way to run the experts, against the dense computation that was timed in turn with it.

    Attributes:
        scope: ``layer`` for an FFN alone, ``model`` for a whole model, ``decode`` for one that writes text.
        name: Of the layer or model.
        backend: What ran the experts.
        router: Whether routers and gates ran as well.
        dtype: Of weights and inputs.
        num_experts: ``E``.
        batch_size: Samples a call of a whole model.
        tokens: That each FFN got in one call, without padding.
        tau: The gates' setting; None for preset masks and budgets.
        share_percent: Executed share of all (token, expert) pairs.
        dense_ms: Median time of a dense call, milliseconds; where text is written, a token's share of it.
        dense_spread_ms: Half the interquartile range of the same.
        moe_ms: Median time of a call with experts.
        moe_spread_ms: Half the interquartile range of the same.
        dense_throughput: Samples a second of a whole model, tokens a second of a layer, and of one that writes.
        moe_throughput: The same with experts.
        speed_up: ``dense_ms / moe_ms``.
        ideal: The speed-up if an FFN's time were in proportion to its FLOPs, routers in, and the rest stayed as it is;
            NaN where the rest was not measured, as of a compiled model. Where text is written, if all time were in
            proportion to the bytes of weights that are read.
        rest_percent: Share of the dense model's time outside its FFNs; None for a layer.
        dense_memory_mib: What a dense call holds at its peak beyond weights and input; NaN where text is written.
        moe_memory_mib: The same with experts.
        noisy: Whether the spread of the dense calls is too wide to tell.
        dense_dtype: Of the dense computation that it is timed against.
        is_dense: Whether it is the dense model on another runtime or in another type, rather than experts.
        score: The task's main metric over test samples, in percent if it is a share; None if none was run.
        dense_score: The same of the dense model.
        score_loss: How much worse ``score`` is.
        budget: Share of the dense FFNs' FLOPs that the gates are set to, instead of a ``tau``.
        new_tokens: That were written behind each text; None where none were.
        bytes_percent: Bytes of weights that are read to write a token of each text, of those of the dense model.
        agreement: Of the tokens that the dense model wrote, those that this way would have written, in percent.
    """

    scope: str
    name: str
    backend: str
    router: bool
    dtype: str
    num_experts: int
    batch_size: int | None
    tokens: int
    tau: float | None
    share_percent: float
    dense_ms: float
    dense_spread_ms: float
    moe_ms: float
    moe_spread_ms: float
    dense_throughput: float
    moe_throughput: float
    speed_up: float
    ideal: float
    rest_percent: float | None
    dense_memory_mib: float
    moe_memory_mib: float
    noisy: bool
    dense_dtype: str = "float32"
    is_dense: bool = False
    score: float | None = None
    dense_score: float | None = None
    score_loss: float | None = None
    budget: float | None = None
    new_tokens: int | None = None
    bytes_percent: float | None = None
    agreement: float | None = None

    @property
    def way(self) -> str:
        """The backend, and whether routers are in; of a dense model, what it runs on."""
        if self.is_dense:
            return f"dense, {self.backend}"
        return f"{self.backend} + router" if self.router else self.backend

    @property
    def amount(self) -> str:
        """How much one call is given."""
        if self.batch_size is not None:
            return f"batch of {self.batch_size}"
        return "1 token" if self.tokens == 1 else f"{self.tokens:,} tokens"


def write_csv(rows: Sequence[BenchmarkRow], machine: Machine, file: Path) -> None:
    """Write one line a row; the last columns say on what it was measured."""
    records = [{**asdict(row), **asdict(machine)} for row in rows]
    with replaced_file(file) as aside, aside.open("w", newline="") as opened:  # Ctrl-C may come meanwhile
        writer = csv.DictWriter(opened, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def as_table(rows: Sequence[BenchmarkRow]) -> Table:
    """The ways that were timed in turn with one dense computation, for the terminal."""
    first = rows[0]
    types = ", ".join(dict.fromkeys(row.dtype for row in rows if not row.is_dense))
    title = f"{first.name}, E={first.num_experts}, {types}, {first.amount}"
    title += "" if first.new_tokens is None else f", {first.new_tokens} tokens written"
    is_scored = first.dense_score is not None
    caption = _caption(first)
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE)
    for header in ("way", "type"):
        table.add_column(header, no_wrap=True)
    writes = first.new_tokens is not None
    unit = "tokens/s" if first.batch_size is None or writes else "samples/s"
    swept = "tau" if all(row.budget is None for row in rows) else "budget"
    read, last = (["bytes read %"], "agreed %") if writes else ([], "peak MiB")
    for header in (swept, "experts run %", *read, "ms", unit, "speed-up", "ideal", last, *(["score"] * is_scored)):
        table.add_column(header, justify="right", no_wrap=header == "ms")
    table.add_row(
        "dense",
        first.dense_dtype,
        "",
        "",
        *(["100.0"] * writes),
        _milliseconds(first.dense_ms, first.dense_spread_ms),
        f"{first.dense_throughput:,.0f}",
        "1.00x",
        "",
        "" if writes else f"{first.dense_memory_mib:.1f}",
        *([_score(first.dense_score)] * is_scored),
    )
    for row in rows:
        is_rival = row.is_dense and row.backend != PYTORCH
        table.add_row(
            row.way,
            "" if is_rival and not writes else row.dtype,
            _setting(row),
            "" if row.is_dense else f"{row.share_percent:.1f}",
            *([_percent(row.bytes_percent)] * writes),
            _milliseconds(row.moe_ms, row.moe_spread_ms),
            f"{row.moe_throughput:,.0f}",
            f"{row.speed_up:.2f}x",
            "" if (row.is_dense and not writes) or math.isnan(row.ideal) else f"{row.ideal:.2f}x",
            _percent(row.agreement) if writes else "" if is_rival else f"{row.moe_memory_mib:.1f}",
            *([_score(row.score)] * is_scored),
        )
    return table


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def verdict(rows: Sequence[BenchmarkRow]) -> str | None:
    """What to do about it, in a line: the fastest way that is as good as dense, and by how much; None for layers alone.

    As good is a loss of at most ``ENOUGH`` in the score, where predictions were judged.

    Args:
        rows: Timed in turn with one dense computation.
    """
    first = rows[0]
    if first.batch_size is None:
        return None
    is_good = [row.score_loss is None or row.score_loss <= ENOUGH for row in rows]
    good = [row for row, fine in zip(rows, is_good, strict=True) if fine and not row.is_dense]
    dense = [row for row, fine in zip(rows, is_good, strict=True) if fine and row.is_dense]
    best_dense = min(dense, key=lambda row: row.moe_ms, default=None)
    if best_dense is None or first.dense_ms <= best_dense.moe_ms:
        rival, rival_ms = "dense PyTorch", first.dense_ms
    else:
        is_judged = first.dense_score is None or best_dense.score is not None
        rival, rival_ms = best_dense.way + ("" if is_judged else ", not judged"), best_dense.moe_ms
    what = f"{first.amount}: "
    near = "" if first.dense_score is None else f" within {ENOUGH:g} of the dense {first.dense_score:.2f}"
    if not good:
        swept = "tau" if all(row.budget is None for row in rows) else "budget"
        return f"{what}no {swept} is{near}; take {rival}, {rival_ms:.2f} ms, or train on"
    best = min(good, key=lambda row: row.moe_ms)
    swept = "tau" if best.budget is None else "a budget of"
    setting = f" at {swept} {_setting(best)}" if _setting(best) else ""
    score = "" if best.score is None else f", score {best.score:.2f}"
    mine = f"experts in {best.dtype}{setting} ({best.moe_ms:.2f} ms{score})"
    ratio = rival_ms / best.moe_ms
    if ratio >= 1:
        return f"{what}fastest{near}: {mine}, {ratio:.2f}x as fast as {rival} ({rival_ms:.2f} ms)"
    return f"{what}fastest{near}: {rival} ({rival_ms:.2f} ms), {1 / ratio:.2f}x as fast as {mine}"


def _setting(row: BenchmarkRow) -> str:
    """What the gates are set to; nothing where they are not."""
    value = row.tau if row.budget is None else row.budget
    return "" if value is None else f"{value:g}"


def _milliseconds(median_ms: float, spread_ms: float) -> str:
    decimals = 3 if median_ms < 10 else 1
    return f"{median_ms:.{decimals}f} ± {spread_ms:.{decimals}f}"


def _caption(row: BenchmarkRow) -> str | None:
    said = []
    if row.rest_percent is not None:
        said.append(f"Attention and all else outside the FFNs take {row.rest_percent:.0f}% of the dense model's time.")
    if row.new_tokens is not None:
        said.append("Times are of a token; the ideal is by bytes of weights that are read.")
    if row.noisy:
        said.append("Too noisy to tell.")
    return "\n".join(said) or None


def draw_speed_up(rows: Sequence[BenchmarkRow], machine: Machine) -> Figure:
    """Speed-up against ``tau``, or against the share executed where choices are preset.

    A panel for each scope, dtype and number of experts. A colour is an amount of tokens or samples, a marker a way to
    run the experts: its median over layers, in a band from the slowest layer to the fastest. Dashed is the ideal.
    """
    panels: dict[tuple, list[BenchmarkRow]] = {}
    for row in (row for row in rows if not row.is_dense):
        panels.setdefault((row.scope, row.dtype, row.num_experts), []).append(row)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7 * columns, 4.5 * lines), layout="constrained")
    figure.suptitle(str(machine), fontsize="small")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, ((scope, dtype, num_experts), drawn) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, drawn)
        axes.set_title(f"{TITLES[scope]}, E={num_experts}, {dtype}")
    return figure


def _draw_panel(axes: Axes, rows: Sequence[BenchmarkRow]) -> None:
    by_tau = rows[0].tau is not None
    colors = {amount: f"C{i % 10}" for i, amount in enumerate(dict.fromkeys(row.amount for row in rows))}
    markers = dict(zip(dict.fromkeys(row.way for row in rows), cycle("osD^vPX*")))
    curves: dict[tuple[str, str], dict[float, list[BenchmarkRow]]] = {}
    for row in rows:
        x = row.share_percent if row.tau is None else row.tau
        curves.setdefault((row.amount, row.way), {}).setdefault(x, []).append(row)
    for (amount, way), points in curves.items():
        xs = sorted(points)
        speed_ups = [[row.speed_up for row in points[x]] for x in xs]
        ideals = [median(row.ideal for row in points[x]) for x in xs]
        color = colors[amount]
        axes.plot(xs, [median(values) for values in speed_ups], color=color, marker=markers[way], markersize=5)
        axes.plot(xs, ideals, color=color, marker="_", linestyle="--", linewidth=1, alpha=0.6)
        lowest, highest = [min(values) for values in speed_ups], [max(values) for values in speed_ups]
        axes.fill_between(xs, lowest, highest, color=color, alpha=0.15, linewidth=0)
    axes.axhline(1.0, linewidth=1, color="black")
    axes.set_xlabel("tau" if by_tau else "experts run, %")
    axes.set_ylabel("speed-up over dense")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1.05 if by_tau else 105)
    axes.grid(alpha=0.3)
    axes.legend(
        handles=[
            *(Line2D([], [], color=color, label=amount) for amount, color in colors.items()),
            *(Line2D([], [], color="grey", marker=marker, label=way) for way, marker in markers.items()),
            Line2D([], [], color="grey", marker="_", linestyle="--", linewidth=1, label="ideal"),
        ],
        fontsize="small",
    )
