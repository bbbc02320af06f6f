"""The rows of a sweep of tau or k, and the ways to show them: a CSV, a table, a curve."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from d2dmoe_pl.callbacks.sweep_settings import SweepSetting
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.metrics.expert_load import LayerLoad, executed_pairs
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.expert_layer import ExpertLayer
from d2dmoe_pl.whole_files import replaced_file

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LAYER_PREFIX = "experts_percent/"


@dataclass
class SweepRow:
    """What the model does at one setting, or with a routing that has none, on one split.

    Attributes:
        stage: Name of the split, ``validation`` or ``test``, or a further one of the data's.
        setting: Value of what is swept; None for a routing that has no setting.
        loss: Mean task loss.
        metric: Name of the task's main metric.
        score: Its value, in percent if it is a share.
        in_percent: Whether it is.
        higher_is_better: Whether a larger score is better.
        experts_percent: Executed share of all (token, expert) pairs, over layers.
        ffn_flops_percent: FLOPs of experts, routers and stand-ins, percent of the dense FFNs' FLOPs; MLPs in the place
            of attention projections are FFNs.
        model_flops: FLOPs of the whole model for the average sample; a multiply-add is 2.
        model_flops_percent: The same, percent of the dense model's.
        layers: ``experts_percent`` of each layer by name.
        swept: Name of what is swept: ``tau``, ``k`` or ``budget``, a share of the dense FFNs' FLOPs.
        samples: That it is measured on.
        is_share_of_samples: Whether the score is the share of them that are right.
    """

    stage: str
    setting: float | None
    loss: float
    metric: str
    score: float
    in_percent: bool
    higher_is_better: bool
    experts_percent: float
    ffn_flops_percent: float
    model_flops: float
    model_flops_percent: float
    layers: dict[str, float]
    swept: str = "tau"
    samples: int = 0
    is_share_of_samples: bool = False

    @property
    def standard_error(self) -> float | None:
        """How far the score may be off for the samples being few, where it is a share of them; else None."""
        if not self.is_share_of_samples or self.samples == 0:
            return None
        share = min(max(self.score / 100, 0.0), 1.0)
        return 100 * (share * (1 - share) / self.samples) ** 0.5

    def as_record(self) -> dict[str, str | float | None]:
        """One flat CSV record; columns are named after the metric, and after what is swept."""
        return {
            "stage": self.stage,
            self.swept: self.setting,
            "loss": self.loss,
            self.metric: self.score,
            "experts_percent": self.experts_percent,
            "ffn_flops_percent": self.ffn_flops_percent,
            "model_flops": self.model_flops,
            "model_flops_percent": self.model_flops_percent,
            "samples": self.samples,
            **{f"{LAYER_PREFIX}{name}": share for name, share in self.layers.items()},
        }


def sweep_row(
    stage: str,
    setting: SweepSetting | None,
    loss: float,
    task: Task,
    score: float,
    layers: Mapping[str, ExpertLayer],
    loads: Sequence[LayerLoad],
    samples: int,
    flops_outside: int,
) -> SweepRow:
    """Cost accounting of one setting.

    Args:
        stage: Name of the split.
        setting: Of the model; None for a routing that has none.
        loss: Mean task loss.
        task: What the model does.
        score: Value of the task's main metric.
        layers: The layers with experts by name.
        loads: What tokens had each layer do.
        samples: Samples seen.
        flops_outside: FLOPs of all samples outside the FFNs.
    """
    pairs = [executed_pairs(load.histogram) for load in loads]
    tokens = [int(load.histogram.sum()) for load in loads]
    moe = list(layers.values())
    possible = [n * layer.sizes.num_experts for n, layer in zip(tokens, moe, strict=True)]
    executed_flops = sum(
        load.work * pair_flops(layer.sizes) + layer.flops_beside_experts(n, samples)
        for load, n, layer in zip(loads, tokens, moe, strict=True)
    )
    dense_flops = sum(n * dense_ffn_flops(layer.sizes) for n, layer in zip(tokens, moe, strict=True))
    return SweepRow(
        stage=stage,
        setting=None if setting is None else setting.value,
        loss=loss,
        metric=task.main_metric,
        score=shown(score, task),
        in_percent=task.in_percent,
        higher_is_better=task.higher_is_better,
        experts_percent=100 * sum(pairs) / sum(possible),
        ffn_flops_percent=100 * executed_flops / dense_flops,
        model_flops=(flops_outside + executed_flops) / samples,
        model_flops_percent=100 * (flops_outside + executed_flops) / (flops_outside + dense_flops),
        layers={name: 100 * p / n for name, p, n in zip(layers, pairs, possible, strict=True)},
        swept="tau" if setting is None else setting.swept,
        samples=samples,
        is_share_of_samples=task.is_share_of_samples,
    )


def shown(score: float, task: Task) -> float:
    """A value of the task's main metric as people read it: in percent if it is a share."""
    return 100 * score if task.in_percent else score


def write_csv(rows: Sequence[SweepRow], file: Path) -> None:
    """Write one line a row, with a column a layer."""
    records = [row.as_record() for row in rows]
    with replaced_file(file) as aside, aside.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def read_csv(file: Path, task: Task) -> list[SweepRow]:
    """The rows that :func:`write_csv` wrote.

    Args:
        file: With the rows.
        task: That they are of.
    """
    with file.open(newline="") as opened:
        records = list(csv.DictReader(opened))
    names = list(records[0])
    swept, metric = names[1], names[3]
    of_layers = {name: name.removeprefix(LAYER_PREFIX) for name in names if name.startswith(LAYER_PREFIX)}
    return [
        SweepRow(
            stage=record["stage"],
            setting=float(record[swept]) if record[swept] else None,
            loss=float(record["loss"]),
            metric=metric,
            score=float(record[metric]),
            in_percent=task.in_percent,
            higher_is_better=task.higher_is_better,
            experts_percent=float(record["experts_percent"]),
            ffn_flops_percent=float(record["ffn_flops_percent"]),
            model_flops=float(record["model_flops"]),
            model_flops_percent=float(record["model_flops_percent"]),
            layers={layer: float(record[name]) for name, layer in of_layers.items()},
            swept=swept,
            samples=int(record["samples"]),
            is_share_of_samples=task.is_share_of_samples,
        )
        for record in records
    ]


def as_table(rows: Sequence[SweepRow], title: str) -> Table:
    """The rows for the terminal."""
    swept = rows[0].swept
    score = score_name(rows[0])
    unit, prefix = _unit(max(row.model_flops for row in rows))
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for header in (swept, score, "loss", "experts run %", "FFN FLOPs %", f"{prefix}FLOPs a sample", "model FLOPs %"):
        table.add_column(header, justify="right", min_width=max(map(len, header.split())))  # wrapped between words
    for row in rows:
        shown = (row.score, row.loss, row.experts_percent, row.ffn_flops_percent)
        cells = ["{:.2f}", "{:.4f}", "{:.1f}", "{:.1f}"]
        table.add_row(
            "-" if row.setting is None else f"{row.setting:g}",
            *(cell.format(value) for cell, value in zip(cells, shown, strict=True)),
            f"{row.model_flops / unit:.3f}",
            f"{row.model_flops_percent:.1f}",
        )
    return table


def _unit(largest: float) -> tuple[float, str]:
    """A unit in which the largest of some numbers has few digits, and its prefix."""
    return next(((unit, prefix) for unit, prefix in UNITS if largest >= unit), (1.0, ""))


def draw_curve(rows: Sequence[SweepRow], references: Mapping[str, float]) -> Figure:
    """The main metric against FFN FLOPs, one line a split, which says what is swept.

    Args:
        rows: Any number of splits' rows.
        references: Scores by label, drawn as horizontal lines.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for stage in dict.fromkeys(row.stage for row in rows):
        of_stage = [row for row in rows if row.stage == stage]
        curve = sorted((row.ffn_flops_percent, row.score) for row in of_stage)
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=stage + _range(of_stage))
    unit = "%" if rows[0].in_percent else ""
    for i, (label, score) in enumerate(references.items()):
        axes.axhline(score, linestyle="--", linewidth=1, color=f"C{7 - i % 4}", label=f"{label}: {score:.2f}{unit}")
    axes.set_xlabel("FFN FLOPs, % of dense (router included)")
    axes.set_ylabel(score_name(rows[0]))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if rows[0].higher_is_better else "upper right")
    return figure


def draw_layers(rows: Sequence[SweepRow]) -> Figure:
    """Experts run by each layer at each setting, as a heat map.

    Args:
        rows: Of one split.
    """
    shares = [[row.layers[name] for row in rows] for name in rows[0].layers]  # (layers, settings)
    figure = Figure(figsize=(2.5 + 0.5 * len(rows), 1.5 + 0.3 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap="viridis", norm=LogNorm(vmin=1, vmax=100))
    axes.set_xticks(range(len(rows)), ["-" if row.setting is None else f"{row.setting:g}" for row in rows])
    axes.set_yticks(range(len(shares)), [name if len(name) <= 24 else f"...{name[-22:]}" for name in rows[0].layers])
    axes.set_xlabel(rows[0].swept)
    figure.colorbar(image, label="experts run, %")
    return figure


def drawn(figure: Figure) -> np.ndarray:
    """The pixels of a figure, ``(height, width, 3)`` bytes: drawing takes long, so once for all who show it."""
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def as_markdown(rows: Sequence[SweepRow]) -> str:
    """The rows as a table for TensorBoard."""
    header = (rows[0].swept, score_name(rows[0]), "loss", "experts run %", "FFN FLOPs %", "model FLOPs %")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        setting = "-" if row.setting is None else f"{row.setting:g}"
        numbers = (row.experts_percent, row.ffn_flops_percent, row.model_flops_percent)
        cells = (setting, f"{row.score:.2f}", f"{row.loss:.4f}", *(f"{number:.1f}" for number in numbers))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(rows: Sequence[SweepRow]) -> str:
    """What is swept from where to where, for the legend; nothing for a routing that has no setting."""
    settings = [row.setting for row in rows if row.setting is not None]
    ends = " to ".join(f"{end:g}" for end in sorted({min(settings), max(settings)})) if settings else ""
    return f", {rows[0].swept} {ends}" if ends else ""


def score_name(row: SweepRow) -> str:
    """The metric's name for people, with its unit, and its direction if that is not the usual one."""
    words = row.metric.replace("_", " ")
    return f"{words}{' %' if row.in_percent else ''}{'' if row.higher_is_better else ' (lower is better)'}"
