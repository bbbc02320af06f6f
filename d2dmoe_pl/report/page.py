"""A report as one HTML page that needs nothing else, and as Markdown."""

import html
import json
import math
from collections.abc import Sequence
from itertools import groupby
from shlex import quote

from d2dmoe_pl.callbacks.save_artifact import FOLDER, WISHED, is_wished
from d2dmoe_pl.callbacks.sweep_table import SweepRow, score_name
from d2dmoe_pl.report.drawings import courses, curve, drawn_or_none, layers, loads, pictures, speeds
from d2dmoe_pl.report.findings import Findings
from d2dmoe_pl.report.single_samples import SampleCompute

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.big { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; list-style: none; }
.big li { flex: 1 1 9rem; background: #f3f6fa; border-radius: .5rem; padding: .7rem .9rem; }
.big b { display: block; font-size: 1.35rem; } .big small { color: #59636e; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } .wide svg { min-width: 34rem; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .25rem .7rem; text-align: right; }
th { border-bottom: 1px solid #d1d9e0; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f6f8fa; }
pre { background: #f3f6fa; border-radius: .5rem; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.words { margin: .6rem 0; line-height: 2; } .words span { padding: .1rem .2rem; border-radius: .2rem; }
.words small { color: #59636e; margin-left: .5rem; }
"""
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
NOISY = "too noisy to tell"


def headline(found: Findings) -> str:
    """What came of it, in one sentence."""
    if found.promised is None or found.path is None:
        return f"{found.folder.name}: {len(found.phases)} phases"
    said = f"{100 * found.promised.ffn_flops:.1f}% of the FFNs' FLOPs, {100 * found.promised.flops:.0f}% of the model's"
    where = "" if found.test is not None else " on validation samples"
    return f"{said}: {_value(found.test, found.promised.score, found)} {words(found.metric)}{where}"


def words(name: str) -> str:
    """A name as people write it."""
    return name.replace("_", " ")


def _value(row: SweepRow | None, score: float, found: Findings) -> str:
    """A score with its standard error, if it has one."""
    in_percent = found.rows[0].in_percent if found.rows else False
    value, error = (score, None) if row is None else (row.score, row.standard_error)
    return f"{value:.2f}" + (f" ± {error:.2f}" if error else "") + ("%" if in_percent else "")


def figures_of_merit(found: Findings) -> list[tuple[str, str]]:
    """The few numbers that matter, each with what it is."""
    merits = []
    metric = words(found.metric)
    if found.test is not None and found.promised is not None:
        merits.append((_value(found.test, found.test.score, found), f"{metric}, test"))
        if found.dense_test is not None:
            dense = _value(found.dense_test, found.dense_test.score, found)
            merits.append((dense, f"{metric} with every expert on, test"))
        merits += [
            (_value(None, found.promised.score, found), f"{metric} promised, by validation"),
            (f"{found.test.ffn_flops_percent:.1f}%", "of the dense FFNs' FLOPs, test"),
            (f"{found.test.model_flops_percent:.1f}%", "of the dense model's FLOPs, test"),
        ]
    if found.times and found.promised is not None:
        said = _speed_up(found, found.promised.ffn_flops)
        merits.append(
            (said, f"{'how fast beside' if said == NOISY else 'as fast as'} {found.running.rival}, {found.timed}")
        )
    return merits


def _speed_up(found: Findings, budget: float | None) -> str:
    """How fast a budget is beside dense; not told where something else ran meanwhile."""
    dense, own = found.times[None], found.times[budget]
    return NOISY if dense.is_noisy or own.is_noisy else f"{dense.median / own.median:.2f}x"


def sweep_tables(found: Findings) -> list[tuple[str, Table]]:
    """What the last model does at each setting, a table a split."""
    tables: list[tuple[str, Table]] = []
    for stage, rows in groupby(found.rows, key=lambda row: row.stage):
        of_stage = list(rows)
        header = (of_stage[0].swept, score_name(of_stage[0]), "loss", "experts run %", "FFN FLOPs %", "model FLOPs %")
        cells = [
            (
                "-" if row.setting is None else f"{row.setting:.4g}",
                f"{row.score:.2f}" + (f" ± {row.standard_error:.2f}" if row.standard_error else ""),
                f"{row.loss:.4f}",
                f"{row.experts_percent:.1f}",
                f"{row.ffn_flops_percent:.1f}",
                f"{row.model_flops_percent:.1f}",
            )
            for row in of_stage
        ]
        tables.append((stage, (header, cells)))
    return tables


def phase_table(found: Findings) -> Table:
    """The phases, what they took and gave."""
    header = ("phase", "minutes", f"validation {words(found.metric)}", f"test {words(found.metric)}")
    factor = 100 if any(row.in_percent for row in found.rows) else 1

    def score(metrics: object, split: str) -> str:
        value = dict(metrics).get(f"{split}/{found.metric}")  # type: ignore[call-overload]
        return "" if value is None else f"{factor * value:.2f}"

    rows = [
        (
            phase.name,
            "" if math.isnan(phase.seconds) else f"{phase.seconds / 60:.1f}",
            score(phase.metrics, "validation"),
            score(phase.metrics, "test"),
        )
        for phase in found.phases
    ]
    return header, rows


def time_table(found: Findings) -> Table:
    """Times beside dense."""
    rows = [
        (
            found.running.rival if budget is None else f"{100 * budget:.3g}%",
            f"{1000 * timing.median:.2f} ± {1000 * timing.spread:.2f}",
            _speed_up(found, budget),
        )
        for budget, timing in found.times.items()
    ]
    return ("FFN FLOPs", "ms", "speed-up"), rows


def commands(found: Findings) -> str:
    """How to load, serve, evaluate and reproduce."""
    last = found.folder / found.phases[-1].name
    is_set = is_wished(found.folder / WISHED, last)
    running = found.running
    model, run = (found.folder / WISHED, found.folder) if is_set else (last / FOLDER, last)
    recipe = found.folder / "recipe.yaml" if (found.folder / "recipe.yaml").is_file() else "RECIPE"
    # rounded up, since less than the least is refused
    share = 0.0 if found.promised is None else min(1.0, math.ceil(1000 * found.promised.ffn_flops) / 1000)
    budget = f"\nset_budget_(model, ffn_flops={share:g})" if found.promised else ""
    names = "load_model, set_budget_" if budget else "load_model"
    timed = f" --budget {share:g}" if found.promised else ""
    # what was cast or rounded for its wish has no dense twin
    whole = model if running.dtype is None else last / FOLDER
    places = (run, model, whole, recipe, f"{found.folder}_again", f"{found.folder}_compiled")
    runs, models, converted, recipes, again, compiled = (quote(str(each)) for each in places)
    predicting = f"python main.py predict --run {runs} --output predictions.csv\n"
    compiling = f"""
# for CPUs like this one, compiled ahead of time; load_compiled loads it
python main.py compile --artifact {models} --dtype {running.dtype or "int8"}{timed} --output_dir {compiled}
"""
    compiled_too = ", optimize=True" if running.optimize else ""
    faster = [] if running.dtype else ['dtype="int8" or "bfloat16"']
    faster += [] if running.optimize else ["optimize=True"]
    hint = f"; {' and '.join(faster)} make{'s' if len(faster) == 1 else ''} it faster" if faster else ""
    return f"""# load{hint}
from d2dmoe_pl import {names}
model = load_model({json.dumps(str(model), ensure_ascii=False)}{compiled_too}){budget}

# {"predict, " if found.predicts else ""}evaluate, time
{predicting if found.predicts else ""}python main.py test --run {runs}
python main.py benchmark --artifact {converted} --config {recipes}{timed}{running.options}
{compiling if found.promised else ""}
# reproduce
python main.py chain --config {recipes} --output_dir {again}"""


def as_html(found: Findings) -> str:
    """The page."""
    parts = [f"<h1>{html.escape(headline(found))}</h1>"]
    if found.asked:
        parts.append(f"<p>Asked for: <b>{html.escape(found.asked)}</b>.</p>")
    items = "".join(
        f"<li><b>{html.escape(value)}</b><small>{html.escape(name)}</small></li>"
        for value, name in figures_of_merit(found)
    )
    parts += [f'<ul class="big">{items}</ul>'] if items else []
    if found.rows:
        last = [row for row in found.rows if row.stage == found.rows[-1].stage]
        drawn = drawn_or_none(curve, found.rows, found.path, found.promised, found.test, score_name(found.rows[0]))
        parts += [
            "<h2>The curve</h2>",
            f'<div class="wide">{drawn}</div>',
            *(_html_table(stage, table) for stage, table in sweep_tables(found)),
        ]
        parts += ["<h2>Experts run by each layer</h2>", f'<div class="wide">{drawn_or_none(layers, last)}</div>']
    if found.loads:
        parts += ["<h2>Load of experts</h2>", f'<div class="wide">{drawn_or_none(loads, found.loads)}</div>']
    if found.times:
        parts += ["<h2>On the clock</h2>", f"<p>{html.escape(found.timed)}, on {html.escape(found.machine)}.</p>"]
        parts += [drawn_or_none(speeds, found.times, found.running.rival), _html_table("", time_table(found))]
    if found.samples:
        parts += ["<h2>Where compute goes</h2>", _html_samples(found.samples)]
    parts += ["<h2>Phases</h2>", _html_table("", phase_table(found)), drawn_or_none(courses, found.phases)]
    parts += ["<h2>Commands</h2>", f"<pre>{html.escape(commands(found))}</pre>"]
    title = html.escape(headline(found))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def as_markdown(found: Findings) -> str:
    """The same without pictures."""
    parts = [f"# {headline(found)}"]
    parts += [f"Asked for: **{found.asked}**."] if found.asked else []
    parts += ["\n".join(f"- **{value}** {name}" for value, name in figures_of_merit(found))]
    for stage, table in sweep_tables(found):
        parts += [f"## The curve: {stage}", _markdown_table(table)]
    if found.times:
        parts += ["## On the clock", f"{found.timed}, on {found.machine}.", _markdown_table(time_table(found))]
    parts += ["## Phases", _markdown_table(phase_table(found)), "## Commands", f"```\n{commands(found)}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _html_table(caption: str, table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    title = f"<h3>{html.escape(caption)}</h3>" if caption else ""
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown_table(table: Table) -> str:
    header, rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _html_samples(samples: Sequence[SampleCompute]) -> str:
    if samples[0].picture is not None:
        return f'<div class="wide">{drawn_or_none(pictures, samples)}</div>'
    largest = max(max(sample.shares) for sample in samples)
    lines = []
    for sample in samples:
        marked = "".join(
            f'<span title="{100 * share:.1f}%" style="background: rgba(31, 111, 235, {0.6 * share / largest:.2f})">'
            f"{html.escape(word)}</span> "
            for word, share in zip(sample.words, sample.shares, strict=True)
        )
        lines.append(f'<p class="words">{marked}<small>{html.escape(sample.said)}</small></p>')
    said = f"The darker a word, the more experts it runs, mean over layers; the darkest {100 * largest:.1f}%."
    return f"<p>{said}</p>{''.join(lines)}"
