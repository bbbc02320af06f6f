"""What a chain has done so far, phase by phase, and what is left to do."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from d2dmoe_pl.artifact import CONFIG, read_artifact
from d2dmoe_pl.callbacks.save_artifact import FOLDER
from d2dmoe_pl.checkpoints import checkpoints_of, remove_checkpoints, why_unreadable
from d2dmoe_pl.errors import check
from d2dmoe_pl.given_files import CONTENT, content, contents
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.run_folders import PHASES, REDO, STATUS, phases_of
from d2dmoe_pl.whole_files import discard, replaced_file

START, AFTER = "model.init_args.init_from", "the phase before it"  # keys of a config
LEFT = f"{CONTENT}what {AFTER} has left"  # one as well, once that is there
MOST_CHANGES, LONGEST_VALUE = 5, 60  # of what is said of a config that has changed
# settings of where and how a phase runs rather than of what it computes
INCIDENTAL = {
    "accelerator",
    "default_root_dir",
    "devices",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "num_nodes",
    "strategy",
}


class Todo(Enum):
    """What is to be done about a phase."""

    SKIP = "finished"
    RESUME = "continues"
    RUN = "starts"


def computed_config(opening: PhaseCLI, after: str | None, output_dir: Path, names: Sequence[str]) -> dict[str, Any]:
    """What decides what a phase computes, flat, as JSON keeps it: a part of its config, and what is in its files.

    Args:
        opening: Of the phase.
        after: The phase that it goes on from; None for the first.
        output_dir: Of the chain.
        names: Of its phases.
    """
    config = json.loads(opening.parser.dump(opening.config, format="json", skip_unset=False))
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in INCIDENTAL}
    if after is not None:
        config["model"]["init_args"].pop("init_from", None)
    flat = _flat(config)
    return {**flat, AFTER: after, **contents(flat, output_dir, names), **left_by(after, output_dir)}


def left_by(name: str | None, output_dir: Path) -> dict[str, str]:
    """What tells the artifact of a phase from what another run of it leaves, as a part of the next one's config.

    Args:
        name: Of the phase; None where there is none.
        output_dir: Of the chain.
    """
    if name is None:
        return {}
    folder = output_dir / name / FOLDER
    files = (folder / CONFIG, *sorted(folder.glob("*.safetensors")))  # not what people put beside it, as an export
    words = list(filter(None, (content(str(file)) for file in files)))
    return {LEFT: " ".join(words)} if words else {}


def data_of(computed: Mapping[str, Any]) -> dict[str, Any]:
    """What of a :func:`computed_config` decides which samples there are."""
    ways = ("batch_size", "num_workers")
    return {key: value for key, value in computed.items() if key.startswith("data.") and not key.endswith(ways)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}.{name}".strip(".")).items()
    }


def plan_of(
    output_dir: Path, names: Sequence[str], computed: Sequence[dict], start_over: str | None, goes_on: bool = False
) -> list[Todo]:
    """What to do about each phase: nothing after the first unfinished one can count as finished.

    Args:
        output_dir: Of the chain.
        names: Of its phases.
        computed: The :func:`computed_config` of each.
        start_over: The phase to redo from; None for none.
        goes_on: Whether that was begun before, so that those are left which are not yet redone.
    """
    plan: list[Todo] = []
    for name, config in zip(names, computed, strict=True):
        folder = output_dir / name
        status = _read_status(folder)
        redo = (name == start_over and not goes_on) or any(todo is not Todo.SKIP for todo in plan)
        is_asked_for = start_over is not None and name in names[names.index(start_over) :]
        if redo and not is_asked_for and status is not None and status["finished"]:
            before, now = status["config"].get(AFTER), config[AFTER]
            check(
                before in (None, now),
                f"{name}: was finished behind {before}, and would be done again behind {now}; --from {name} redoes it "
                "and all that follow, another output_dir keeps both",
            )
        if redo or status is None:
            plan.append(Todo.RUN)
            continue
        changes = _changes(status["config"], config)
        if status["finished"] and changes and goes_on and name in names[names.index(start_over) :]:
            plan.append(Todo.RUN)  # left by the run that is redone
            continue
        if status["finished"]:
            read_artifact(folder / FOLDER, f"finished phase {name}")
            check(
                not changes,
                f"{name}: its config has changed since it was finished; --from {name} redoes it and all that follow, "
                f"another output_dir keeps both: {changes}",
            )
            plan.append(Todo.SKIP)
        else:
            if changes:
                say(f"{name}: its config has changed since it was interrupted; it starts over. {changes}", "yellow")
            plan.append(Todo.RUN if changes else Todo.RESUME)
    return plan


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in a few lines' length; a setting that is new since, and says nothing, is no difference.

    Neither are files that are gone: what needs them says so.
    """
    if AFTER not in before:  # of an earlier version, which noted less
        now = {key: now[key] for key in now if not (key in (AFTER, START) or key.startswith(CONTENT))}
    if LEFT not in before:  # the same, or it was begun before that was there
        now = {key: now[key] for key in now if key != LEFT}
    before = {key: value for key, value in before.items() if key in now or not key.startswith(CONTENT)}
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    keys = [key for key in keys if key in before or not (now[key] is False or now[key] in ("", []))]
    told = [f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in keys[:MOST_CHANGES]]
    more = len(keys) - len(told)
    return "; ".join([*told, *([f"and {more} more"] if more else [])])


def _short(value: Any) -> str:
    text = str(value)
    if len(text) <= LONGEST_VALUE:
        return text
    begin = LONGEST_VALUE // 3
    return f"{text[:begin]}…{text[begin + 1 - LONGEST_VALUE :]}"  # paths differ at the end


def _read_status(folder: Path) -> dict[str, Any] | None:
    file = folder / STATUS
    if not file.is_file():
        return None
    try:
        status = json.loads(file.read_text())
        read = {"finished": bool(status["finished"]), "config": dict(status["config"])}
        took = status.get("seconds")  # which earlier versions did not note
        return {**read, "seconds": math.nan if took is None else float(took)}
    except (ValueError, KeyError, TypeError) as error:
        say(f"{folder.name}: {STATUS} cannot be read ({type(error).__name__}); it starts over.", "yellow")
        return None


def redo_goes_on(output_dir: Path, names: Sequence[str], computed: Sequence[dict], start_over: str | None) -> bool:
    """Whether the phases from ``start_over`` on were begun to be redone before, that one as it is now.

    Args:
        output_dir: Of the chain.
        names: Of its phases.
        computed: The :func:`computed_config` of each.
        start_over: The phase to redo from; None for none.
    """
    if start_over is None:
        return False
    try:
        begun = bool(json.loads((output_dir / REDO).read_text())["from"] == start_over)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    status = _read_status(output_dir / start_over) if begun else None
    is_other = (
        status is not None and status["finished"] and _changes(status["config"], computed[names.index(start_over)])
    )
    return begun and not is_other


@rank_zero_only
def begin_redo(output_dir: Path, start_over: str) -> None:
    """Discard the phase to redo from, and note that it is done."""
    discard_phase(output_dir / start_over)
    with replaced_file(output_dir / REDO) as aside:
        aside.write_text(json.dumps({"from": start_over}) + "\n")


@rank_zero_only
def end_redo(output_dir: Path) -> None:
    """Note that nothing is left of what was to be redone."""
    (output_dir / REDO).unlink(missing_ok=True)


@rank_zero_only
def note_phases(output_dir: Path, names: Sequence[str]) -> None:
    """Note which phases a chain has, and say which of an earlier recipe lie beside them."""
    before = phases_of(output_dir) or []
    for name in before:
        if name not in names and (output_dir / name / STATUS).is_file():
            say(f"{name}: no longer in the recipe, left as it is ({output_dir / name})")
    if before != list(names):
        with replaced_file(output_dir / PHASES) as aside:
            aside.write_text(json.dumps({"phases": list(names)}) + "\n")


@rank_zero_only
def discard_phase(folder: Path) -> None:
    """Remove what an earlier run of a phase left; of a folder that no chain made, only what it could go on from."""
    if (folder / STATUS).is_file():
        discard(folder)
    else:
        remove_checkpoints(folder)


def checkpoint_of(folder: Path) -> Path | None:
    """What a phase goes on from: the newest of its checkpoints that can be read, or None; others are said."""
    for file in checkpoints_of(folder):
        reason = why_unreadable(file)
        if reason is None:
            return file
        say(f"{folder.name}: {file.name} cannot be read ({reason}); the one before is taken, or it starts.", "yellow")
    return None


@contextmanager
def noted(folder: Path, config: dict[str, Any], goes_on: bool) -> Iterator[None]:
    """Note what a phase computes, whether it has, and the seconds that it took.

    Args:
        folder: The phase's.
        config: What decides what it computes.
        goes_on: Whether it was begun before, by a run whose time counts too, unless it was killed.
    """
    before = seconds_of(folder) if goes_on else 0.0
    begun, finished = time.monotonic(), False
    _write_status(folder, config, finished, before)
    try:
        yield
        finished = True
    finally:
        _write_status(folder, config, finished, before + time.monotonic() - begun)


def seconds_of(folder: Path) -> float:
    """What a phase took so far, its test included; NaN where nothing says."""
    status = _read_status(folder)
    return math.nan if status is None else status["seconds"]


@rank_zero_only
def _write_status(folder: Path, config: dict[str, Any], finished: bool, seconds: float) -> None:
    took = None if math.isnan(seconds) else round(seconds, 3)
    status = {"finished": finished, "config": config, "seconds": took}
    with replaced_file(folder / STATUS) as aside:
        aside.write_text(json.dumps(status, indent=2, sort_keys=True) + "\n")


@rank_zero_only
def say(text: str, style: str | None = None) -> None:
    """Print a line of the chain's own on standard error, on the first process only."""
    Console(stderr=True).print(text, style=style, highlight=False, soft_wrap=True, markup=False)
