"""The table of models in docs/own_data_and_models.md: what the contract tests run over, and which phases take it.

    python tests/models_table.py

writes it between its two markers. Nothing in it is written by hand: architectures, tasks and files are the adapters',
and every phase is tried on the shapes of each tiny model.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tiny

from d2dmoe_pl import adapters
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.projections import select_projections
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    BudgetDistillation,
    CutoffFitting,
    ExpertClustering,
    ExpertSelection,
    FineTuning,
    ImportanceScoring,
    MoEBERTDistillation,
    Phase,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
    StandInFitting,
)
from d2dmoe_pl.phases._preflight import preflight

PAGE = Path(__file__).parents[1] / "docs" / "own_data_and_models.md"
BEGIN = "<!-- the table of models: python tests/models_table.py writes it -->"
END = "<!-- end of the table of models -->"
FITTED = [CutoffFitting(), StandInFitting(4)]
CALIBRATED = [*FITTED, RecoveryTuning(), BudgetCalibration(), BudgetDistillation(), BudgetCalibration()]
# by method, its phases in order; all start with FineTuning
METHODS = {
    "D2DMoE": [SparsityEnforcement(), ExpertClustering(8), RouterRegression(8), *CALIBRATED],
    "D2DMoE, projections too": [
        AttentionDistillation(),
        SparsityEnforcement(),
        ExpertClustering(8, num_projection_experts=4),
        RouterRegression(8),
        *CALIBRATED,
    ],
    "MoEfication": [ExpertClustering(8), ExpertSelection(3)],
    "MoEBERT": [ImportanceScoring(), MoEBERTDistillation(4, 12, 5, init_from="-")],
}


def accepted(source: adapters.ModelSource, method: Sequence[Phase]) -> list[str]:
    """Names of the phases of ``method`` that a model from ``source`` can go through, one after the other."""
    start = FineTuning(source=source, activation="relu")
    preflight([start])
    for length in range(len(method), 0, -1):
        try:
            preflight([start, *method[:length]])
        except ConfigError:
            continue
        return [type(phase).__name__ for phase in method[:length]]
    return []


def configuration_of(kind: str) -> str:
    """The configuration of a tiny model, whatever its task."""
    return max((name for name in tiny.CONFIGS if kind == name or kind.startswith(f"{name}-")), key=len, default=kind)


def cell(names: Sequence[str], method: Sequence[Phase]) -> str:
    """What the table says of the phases that a model can go through."""
    if len(names) == len(method):
        return "yes"
    return ", ".join(f"`{name}`" for name in names) or "no"


def rows(kinds: Iterable[str] = tiny.SOURCES) -> list[list[str]]:
    """Cells of each row, of these tiny models; those that differ in their task alone share one."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    cells_of: dict[str, list[str]] = {}
    for kind in kinds:
        source, adapter = tiny.SOURCES[kind], adapters.adapter_named(tiny.family_of(kind))
        file = f"`{adapter.__module__.replace('.', '/')}.py`"
        model = source().build_structure(tiny.labels_of(kind))
        form = "gated" if any(ffn.gate_proj is not None for ffn in select_ffns(model)) else "plain"
        projections = [] if adapter.attention is None else select_projections(model)
        is_fused = any(projection.place != projection.name for projection in projections)
        form += ", fused" if is_fused else ", separate" if projections else ", not named"
        if (name := configuration_of(kind)) not in cells_of:  # what a task adds lies outside the FFNs
            cells_of[name] = [cell(accepted(source(), method), method) for method in METHODS.values()]
        cells = cells_of[name]
        known = tasks.setdefault((adapter.title, form, *cells, file), [])
        task = tiny.TASKS[kind].replace("-", " ")
        known.extend([task] if task not in known else [])
    return [[title, ", ".join(names), *rest] for (title, *rest), names in tasks.items()]


def render() -> str:
    """The table, in Markdown."""
    header = ["architecture", "task", "FFN, projections", *METHODS, "file"]
    head, *body = [f"| {' | '.join(cells)} |" for cells in [header, *rows()]]
    return "\n".join([head, "|---" * len(header) + "|", *body])


def placed(text: str) -> str:
    """``text`` with the table between its markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(placed(PAGE.read_text()))
