"""Phases in order, each from the artifact of the one before; run again after an interruption, it goes on."""

import logging
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only

from d2dmoe_pl.artifact import load_model, record_metrics
from d2dmoe_pl.callbacks.check_later_phases import CheckLaterPhases
from d2dmoe_pl.callbacks.save_artifact import FOLDER
from d2dmoe_pl.chain_lock import locked
from d2dmoe_pl.chain_settings import check_left_to_chain, phase_arguments, split_settings
from d2dmoe_pl.chain_status import (
    Todo,
    begin_redo,
    checkpoint_of,
    computed_config,
    data_of,
    discard_phase,
    end_redo,
    left_by,
    note_phases,
    noted,
    plan_of,
    redo_goes_on,
    say,
    seconds_of,
)
from d2dmoe_pl.checkpoints import FOLDER as CHECKPOINTS
from d2dmoe_pl.checkpoints import remove_preempted
from d2dmoe_pl.errors import ConfigError, InterruptedPhaseError, check
from d2dmoe_pl.parser_line import parser_line
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.phases import Phase
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.recipe import check_phase_name, recipe_file
from d2dmoe_pl.report.writing import HTML, discard_report, write_report
from d2dmoe_pl.run_folders import RUN, phases_of, with_run
from d2dmoe_pl.sharded_tensors import is_sharded
from d2dmoe_pl.whole_files import clean_up, is_file_name, named_folder


def run_chain(config: Namespace) -> None:
    """Run the phases of a chain that are not finished.

    Everything that can be checked is checked before the first of them starts. Every process of a distributed run goes
    through this function and comes to the same plan, from the arguments and the status files alone.

    Args:
        config: What :func:`chain_parser` parsed.

    Raises:
        ConfigError: For a wrong setting of the chain or of any phase.
    """
    names = list(config.phases)
    check(len(names) > 0, "phases={}: must be at least one")
    for name in names:
        check(is_file_name(name), f"phases: {name!r} must be the name of a folder in output_dir")
        check_phase_name(name, f"phases: {name!r}")
    start_over = config.get("from")
    check(start_over is None or start_over in names, f"from={start_over!r}: allowed are {', '.join(names)}")
    settings = split_settings(config.get("set", []), names)
    output_dir = named_folder(config.output_dir, "output_dir")
    config.output_dir = str(output_dir)
    seed = config.seed
    check(seed is not None and 0 <= seed < 2**32, f"seed={seed}: must lie in [0, 2**32)")
    check_left_to_chain(config, settings)
    for place in (output_dir, *(output_dir / name for name in names if (output_dir / name).is_file())):
        check_writable(place)

    with quiet_lightning():
        _run_phases(
            names, [phase_arguments(config, settings, index) for index in range(len(names))], output_dir, start_over
        )


def _run_phases(names: Sequence[str], arguments: Sequence[list[str]], output_dir: Path, start_over: str | None) -> None:
    openings = [_opened(output_dir / name, given) for name, given in zip(names, arguments, strict=True)]
    with locked(output_dir):
        _clean_up(output_dir, names)
        _run_what_is_left(names, arguments, openings, output_dir, start_over)


def _opened(folder: Path, arguments: Sequence[str]) -> PhaseCLI:
    try:
        opening = PhaseCLI(args=list(arguments), run=False, folder=folder)
    except ArgumentError as error:
        raise ConfigError(f"{folder.name}: {parser_line(str(error))}") from error
    asked = opening.config.trainer.strategy
    check(
        not isinstance(opening.trainer.strategy.launcher, _MultiProcessingLauncher),
        f"strategy={asked if isinstance(asked, str) else asked.class_path}: its processes end with a training, and "
        "what is trained with them; must be auto, ddp or another in a chain",
    )
    dry: Any = opening.trainer.fast_dev_run  # type: ignore[attr-defined] # Lightning sets it
    check(
        not dry,
        f"fast_dev_run={dry}: must be false in a chain, since it leaves nothing for the next phase; "
        "trainer.max_epochs=1 and trainer.limit_train_batches make a short one",
    )
    return opening


def _run_what_is_left(
    names: Sequence[str],
    arguments: Sequence[list[str]],
    openings: list[PhaseCLI],
    output_dir: Path,
    start_over: str | None,
) -> None:
    computed = [
        computed_config(opening, after, output_dir, names)
        for opening, after in zip(openings, (None, *names[:-1]), strict=True)
    ]
    goes_on = redo_goes_on(output_dir, names, computed, start_over)
    if goes_on:
        say(f"What was begun to be redone from {start_over} on goes on.")
    plan = plan_of(output_dir, names, computed, start_over, goes_on)
    first = next((index for index, todo in enumerate(plan) if todo is not Todo.SKIP), None)
    for name, todo in zip(names, plan, strict=True):
        say(f"{name}: {todo.value}" + (f" ({output_dir / name})" if todo is Todo.SKIP else ""))
    if first is None:
        say(f"Nothing to do. Redo with --from PHASE ({', '.join(names)}).")
        end_redo(output_dir)
        environment = getattr(openings[-1].trainer.strategy, "cluster_environment", None)
        is_one_of_several = environment is not None and environment.creates_processes_externally
        if phases_of(output_dir) not in (None, list(names)):
            discard_report(output_dir)  # of other phases
        note_phases(output_dir, names)
        if not (output_dir / HTML).is_file() and not is_one_of_several:  # it was broken off
            _say_report(output_dir, names, _reopened(output_dir / names[-1]))
        return
    openings = openings[first:]
    preflight(
        [opening.model for opening in openings],
        [opening.datamodule for opening in openings],
        openings[0].trainer.strategy,
        [opening.trainer.callbacks for opening in openings],  # type: ignore[attr-defined] # Lightning sets it
    )
    of_data = [data_of(each) for each in computed[first:]]
    later = [opening.model for opening, data in zip(openings, of_data, strict=True) if data == of_data[0]][1:]
    openings.clear()
    if start_over is not None and not goes_on:
        begin_redo(output_dir, start_over)
    discard_report(output_dir)
    note_phases(output_dir, names)

    for index in range(first, len(names)):
        say(f"Phase {index + 1} of {len(names)}: {names[index]}", style="bold")
        try:
            after = None if index == 0 else names[index - 1]
            noted_config = {**computed[index], **left_by(after, output_dir)}  # which may be there only by now
            finished = _run_phase(output_dir / names[index], arguments[index], noted_config, plan[index], later)
        except (KeyboardInterrupt, SystemExit):
            say(f"Interrupted in {names[index]}. The same command goes on from there.", style="bold")
            raise
        except ConfigError:
            raise
        except Exception as error:
            raise InterruptedPhaseError(names[index], output_dir / names[index]) from error
        later = []
    end_redo(output_dir)
    say(f"Finished. The model: {output_dir / names[-1] / FOLDER}", style="bold")
    if finished.trainer.is_global_zero:
        if is_sharded(finished.model.model):  # this process alone could not run it
            finished.model.model = load_model(output_dir / names[-1] / FOLDER)
            finished.model.to("cpu")
        _say_report(output_dir, names, finished)


def _say_report(output_dir: Path, names: Sequence[str], last: PhaseCLI) -> None:
    seconds = {name: seconds_of(output_dir / name) for name in names}
    say(f"Report: {write_report(output_dir, seconds, last.model)}", style="bold")


def _reopened(folder: Path) -> PhaseCLI:
    """A finished phase as it is after its test, on one process and with nothing written."""
    alone = ["--trainer.logger=false", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    opening = PhaseCLI(args=[*with_run([f"{RUN}={folder}"]), *alone], run=False)
    trainer: Any = opening.trainer
    trainer.callbacks, trainer.limit_test_batches = [], 1
    trainer.test(opening.model, datamodule=opening.datamodule, verbose=False)
    return opening


def check_writable(output_dir: Path) -> None:
    """Raise ``ConfigError`` unless there is a folder, or can be one, that takes files; none is left there."""
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    try:
        with TemporaryFile(dir=place):  # it has no name that could be left behind
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir={str(output_dir)!r}: no files can be written there ({error.strerror})"
        ) from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Let Lightning only warn: what it says of itself at every start would bury what the chain says."""
    loggers = [logging.getLogger(library) for library in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@rank_zero_only
def _clean_up(output_dir: Path, names: Sequence[str]) -> None:
    for folder in (output_dir, *(output_dir / name for name in names)):
        clean_up(folder)
        clean_up(folder / CHECKPOINTS)


def _run_phase(
    folder: Path, arguments: list[str], computed: dict[str, Any], todo: Todo, later: Sequence[Phase]
) -> PhaseCLI:
    """Fit and test one phase; its artifact, with the test metrics, is then complete and its status ``finished``.

    Args:
        folder: The phase's.
        arguments: As ``fit`` takes them.
        computed: What decides what it computes.
        todo: Whether it goes on.
        later: Phases that its data has to be enough for as well.
    """
    resume_from = checkpoint_of(folder) if todo is Todo.RESUME else None
    if todo is Todo.RUN:
        discard_phase(folder)
    opening = PhaseCLI(args=arguments, run=False, folder=folder)  # anew: a Trainer runs once, and the seed is set here
    trainer: Any = opening.trainer
    trainer.callbacks.append(CheckLaterPhases(later))
    with noted(folder, computed, goes_on=todo is Todo.RESUME):
        opening.trainer.fit(opening.model, datamodule=opening.datamodule, ckpt_path=resume_from, weights_only=True)
        metrics = opening.trainer.test(opening.model, datamodule=opening.datamodule, verbose=False)
        if opening.trainer.is_global_zero:
            record_metrics(folder / FOLDER, {key: value for each in metrics for key, value in each.items()})
            remove_preempted(folder)
    opening.trainer.strategy.barrier()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return opening


def default_recipe() -> Path:
    """The embedded default chain: a small ViT on scikit-learn's digits.

    Raises:
        ConfigError: If the package was installed without the project's ``configs`` folder.
    """
    recipe = recipe_file("digits_vit")
    if not recipe.is_file():
        raise ConfigError(f"config=None: {recipe} is not there; give --config, or run from a checkout of the project")
    return recipe
