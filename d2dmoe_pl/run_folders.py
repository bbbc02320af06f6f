"""The folder of a run in the place of its config: what evaluates the phase that left it, and where that is written."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from d2dmoe_pl.artifact import CONFIG as ARTIFACT_CONFIG
from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.callbacks.save_artifact import FOLDER, WISHED, is_wished
from d2dmoe_pl.errors import check
from d2dmoe_pl.given_files import CONTENT, content
from d2dmoe_pl.notices import notice

RUN = "--run"
CONFIG = "config.yaml"
STATUS = "phase.json"  # what a chain notes of a phase beside it
PHASES = "chain.json"  # and beside all of them: which there are
REDO = ".redo.json"  # from which of them on a chain that is not finished was asked to be redone
EVALUATIONS = "evaluations"  # the folder in a run's that evaluations of it are written to


def with_run(arguments: Sequence[str]) -> list[str]:
    """The arguments of an evaluation, in which a finished run's folder or config stands for the model that it left.

    Args:
        arguments: Behind ``validate``, ``test`` or ``predict``; ``--run FOLDER``, or ``--config FOLDER/config.yaml``.

    Raises:
        ConfigError: If there is no finished run.
    """
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if key not in (RUN, "--config", "-c"):
            found.append(argument)
            continue
        value = value if equals else rest.pop(0) if rest else ""
        folder = finished_run(value) if key == RUN else Path(value).parent
        if key != RUN and not (Path(value).name == CONFIG and (folder / FOLDER / ARTIFACT_CONFIG).is_file()):
            found += ["--config", value]
            continue
        artifact, as_saved = folder / FOLDER, []
        if key == RUN and folder != Path(value):
            if is_wished(Path(value) / WISHED, folder):
                artifact, as_saved = Path(value) / WISHED, ["--model.init_args.ffn_flops=null"]
                notice(f"{artifact} is evaluated, as compress has set it.")
            else:
                notice(f"{folder} is evaluated, the last phase of {value} that is finished.")
        start = f"--model.init_args.init_from={artifact}"
        config = yaml.safe_load((folder / CONFIG).read_text())
        # not every phase can begin from a source
        no_source = ["--model.init_args.source=null"] if "source" in config["model"]["init_args"] else []
        found += ["--config", str(folder / CONFIG), *_in_place(config, folder), *no_source, *as_saved, start]
    return found


def finished_run(folder: str) -> Path:
    """The folder of a finished phase: ``folder`` itself, or of a chain's, that of its last phase that is finished.

    Which phases a chain has is what it noted when it ran last: those of an earlier recipe may lie beside them.

    Raises:
        ConfigError: If there is none, or nothing says which of several is the last.
    """
    place = Path(folder)
    if _is_finished(place):
        return place
    phases = phases_of(place)
    names = sorted(each.name for each in place.glob("*") if each.is_dir()) if phases is None else phases
    runs = [place / name for name in names if _is_finished(place / name)]
    valid = [run for run in runs if _is_valid(run)]
    if not valid and not (place / REDO).is_file():  # people may have removed the first ones
        valid = runs
    check(
        bool(valid),
        f"run={folder!r}: no finished phase; must be the folder of one, with {CONFIG} and {FOLDER}, or of a chain",
    )
    if phases is not None:
        return valid[-1]
    steps = [len(read_artifact(run / FOLDER).history) for run in valid]
    last = [run for run, number in zip(valid, steps, strict=True) if number == max(steps)]
    told = " and ".join(run.name for run in last)
    check(len(last) == 1, f"run={folder!r}: {told} are finished, none behind another; must be the folder of one")
    return last[0]


def phases_of(output_dir: Path) -> list[str] | None:
    """The names of a chain's phases, as of its last run; None where none has noted them."""
    try:
        names = json.loads((output_dir / PHASES).read_text())["phases"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _is_finished(run: Path) -> bool:
    return (run / CONFIG).is_file() and (run / FOLDER / ARTIFACT_CONFIG).is_file()


def _is_valid(run: Path) -> bool:
    """Whether a run's artifact came of those that lie beside it; a chain that is redone leaves older ones behind."""
    config = yaml.safe_load((run / CONFIG).read_text())
    before = config["model"]["init_args"].get("init_from")
    if before is None:
        return True
    earlier = run.parent / Path(before).parent.name  # wherever the chain was when it ran
    if not (earlier / FOLDER / ARTIFACT_CONFIG).is_file():
        return Path(before, ARTIFACT_CONFIG).is_file() and Path(before).parent.parent.resolve() != run.parent.resolve()
    history, told = (read_artifact(each / FOLDER).history for each in (run, earlier))
    return history[: len(told)] == told and _is_valid(earlier)


def _in_place(config: Any, folder: Path) -> list[str]:
    """The arguments that have a run write below the folder where it is now, which may not be where it was made."""
    trainer = config.get("trainer") or {}
    found = [] if trainer.get("default_root_dir") is None else [f"--trainer.default_root_dir={folder}"]
    loggers = trainer.get("logger")
    first = next(iter(loggers), None) if isinstance(loggers, list) else loggers
    if isinstance(first, dict) and {"save_dir", "name"} <= (first.get("init_args") or {}).keys():
        here = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
        own = {**first, "init_args": {**first["init_args"], **here}}
        found.append(f"--trainer.logger={json.dumps(own)}")
    return found


def check_data_is_here(config: Namespace) -> None:
    """Raise ``ConfigError`` where a run was made from files by paths that lead nowhere from the working folder.

    They would be looked for on the hub. Which settings were paths of files is what a chain notes.

    Args:
        config: Of an evaluation, with the files that it was read from under ``config``.
    """
    for given in config.get("config") or []:
        status = Path(os.fspath(given)).parent / STATUS if given is not None else None
        if status is None or not status.is_file():
            continue
        try:
            made = dict(json.loads(status.read_text())["config"])
        except (ValueError, KeyError, TypeError):  # a note that is cut off stands in no evaluation's way
            continue
        for setting, path in made.items():
            was_there = setting.startswith("data.") and isinstance(path, str) and f"{CONTENT}{path}" in made
            check(
                not was_there or config.get(setting) != path or content(path) is not None,
                f"{setting.rpartition('.')[2]}={path!r}: is not here, but {status.parent} was made from it; must be "
                f"started in the folder where that was, or be given --{setting}",
            )


def logger_beside(logger: Any) -> Any:
    """The config of a logger for an evaluation: below the folder of the run, if it would write into one.

    Args:
        logger: As ``trainer.logger`` is configured.
    """
    given = logger.get("init_args") if hasattr(logger, "get") else None
    if not given or given.get("save_dir") is None:
        return logger
    folder = Path(given["save_dir"]) / (given.get("name") or "") / str(given.get("version") or "")
    if (folder / FOLDER).is_dir():
        given["save_dir"], given["name"], given["version"] = str(folder), EVALUATIONS, None
    return logger


def loggers_in(folder: Path, asked: Any) -> Any:
    """The config of a chain's loggers: its own, which writes to the folder of a phase, and then those asked for.

    What a phase leaves lies in the folder of its first logger; without loggers, in ``default_root_dir``.

    Args:
        folder: The phase's.
        asked: As ``trainer.logger`` is configured; False for none.
    """
    if asked is False:
        return False
    place = Namespace(save_dir=str(folder.parent), name=folder.name, version="")
    own = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=place)
    more = [] if asked in (None, True) else asked if isinstance(asked, list) else [asked]
    return [own, *more] if more else own
