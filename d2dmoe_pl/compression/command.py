"""``compress``: writes a recipe for a model and a wish, runs it, sets the model to the wish, and reports."""

import json
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from torch import nn

from d2dmoe_pl.adapters import KEY, adapter_for
from d2dmoe_pl.artifact import CONFIG, load_model, read_artifact, save_artifact
from d2dmoe_pl.artifact_parts import copy_processor
from d2dmoe_pl.benchmark.runtimes import RUNTIMES, check_runtimes
from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.callbacks.save_artifact import FOLDER, WISHED
from d2dmoe_pl.callbacks.sweep_table import SweepRow
from d2dmoe_pl.callbacks.tau_sweep import TauSweep
from d2dmoe_pl.chain import check_writable, quiet_lightning, run_chain
from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.chain_lock import locked
from d2dmoe_pl.chain_status import say, seconds_of
from d2dmoe_pl.compile_arguments import DTYPES
from d2dmoe_pl.compress_arguments import EFFORTS, compress_parser
from d2dmoe_pl.compression.budget_for_target import Found, budget_for
from d2dmoe_pl.compression.recipe_for_model import recipe_for
from d2dmoe_pl.compression.target import Target, parse_target
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.activations import own_activations
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, budget_path, set_taus_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.parser_line import parser_line
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.recipe import phase_config, read_recipe
from d2dmoe_pl.report.measured_speed import Running, measured_times, timed_batches
from d2dmoe_pl.report.writing import write_report
from d2dmoe_pl.whole_files import named_folder, replaced_file

RECIPE = "recipe.yaml"
LAST = "budget_calibration"  # the phase that finds budgets
START = "start"  # in the output folder, the model that was given in memory


@dataclass(frozen=True)
class Compressed:
    """What came of a wish.

    Attributes:
        folder: With the recipe, the phases, the model and the report.
        target: What was wished for.
        promised: What the budget costs and gives on the validation split.
        test: The same on the test split.
        dense: With every expert on, on the test split.
        path: The budgets of the model, among which ``promised`` is.
    """

    folder: Path
    target: Target
    promised: BudgetPoint
    test: SweepRow
    dense: SweepRow
    path: BudgetPath

    def load(self) -> nn.Module:
        """The model, set to what was wished for; another wish may have set what is in the folder since.

        Raises:
            ConfigError: If another model has since been made in the folder.
        """
        model = load_model(self.folder / WISHED)
        check(
            budget_path(model) == self.path,
            f"{self.folder / WISHED}: has been made anew since; must be what this compress made, which runs again",
        )
        set_taus_(model, self.path, self.promised.taus)
        return model


def compress(
    model: str | nn.Module | None = None,
    data: str | Mapping[str, Any] | None = None,
    *,
    target: str = "ffn_flops=25%",
    effort: str = "minutes",
    output_dir: str | Path = "runs/compress",
    **options: Any,
) -> Compressed:
    """Make a model cost what is wished for, by a recipe that is chosen from the model and its data.

    Args:
        model: Folder or hub name of a Hugging Face model, name of a timm model, artifact, or a dense model in memory.
        data: A file or a folder of files, a dataset on the hub, or what a recipe's data says.
        target: ``ffn_flops=10%``, ``flops=45%``, ``speed=2x`` or ``drop=0.5``.
        effort: ``minutes`` trains nothing but routers; ``hours`` the model as well.
        output_dir: Gets the recipe, a folder a phase, the model, the report. Run again, it goes on where it was.
        options: The others that ``python main.py compress --help`` describes.

    Returns:
        What came of it.

    Raises:
        ConfigError: For a wish that cannot be read or reached, and whatever is wrong with model or data.

    Example:
        >>> from d2dmoe_pl import compress
        >>> made = compress("my/text_model", "my/train.csv", target="drop=0.5")  # doctest: +SKIP
        >>> made.load()  # doctest: +SKIP
    """
    if isinstance(model, nn.Module):
        folder = named_folder(str(output_dir), "output_dir")
        check_writable(folder)
        model = str(_kept(model, folder / START))
    named = {"model": model, "data": data, "target": target, "effort": effort, "output_dir": output_dir, **options}
    parser = compress_parser()
    known = parser.get_defaults()
    for name, value in named.items():
        check(name in known, f"{name}={value!r}: no option of compress; see compress --help")
        check(value is not None or known[name] is None, f"{name}=None: must be given")
    written = {name: dict(value) if isinstance(value, Mapping) else value for name, value in named.items()}
    written["output_dir"] = str(output_dir) if isinstance(output_dir, Path) else output_dir
    try:
        given = parser.parse_object(written)
    except ArgumentError as error:
        raise ConfigError(parser_line(str(error))) from error
    made = run_compress(given)
    assert made is not None
    return made


def run_compress(given: Namespace) -> Compressed | None:
    """What the command does.

    Args:
        given: What :func:`compress_parser` parsed.

    Returns:
        None where the recipe was only to be printed.

    Raises:
        ConfigError: As :func:`compress`.
    """
    check(given.dtype is None or given.dtype in DTYPES, f"dtype={given.dtype!r}: allowed are {', '.join(DTYPES)}")
    check(
        given.against is None or given.against in RUNTIMES,
        f"against={given.against!r}: allowed are {', '.join(RUNTIMES)}",
    )
    check_runtimes([] if given.against is None else [given.against], "against")
    target = parse_target(given.target, given.against)
    check(given.effort in EFFORTS, f"effort={given.effort!r}: allowed are {', '.join(EFFORTS)}")
    check(given.batch_size > 0, f"batch_size={given.batch_size}: must be positive")
    folder = named_folder(given.output_dir, "output_dir")
    if given.print_config is None:
        check_writable(folder)
    recipe = recipe_for(given, target)
    if given.print_config is not None:
        print(yaml.safe_dump(recipe, sort_keys=False), end="")
        return None
    with locked(folder):
        _write_recipe(folder / RECIPE, recipe, given.effort)
    arguments = [f"--config={folder / RECIPE}", f"--output_dir={folder}"]
    arguments += [] if given["from"] is None else [f"--from={given['from']}"]
    run_chain(chain_parser().parse_args(arguments))
    with locked(folder):
        return _set_and_measured(target, folder, given)


def _kept(model: nn.Module, folder: Path) -> Path:
    """The artifact of a model in memory; one that phases began with must be of the same."""
    if not folder.is_dir() or not (folder.parent / RECIPE).is_file():
        save_artifact(model, folder)
        return folder
    check(
        _is_same(model, folder),
        f"{folder}: is of another model than the one that is given; must be another output_dir",
    )
    return folder


def _is_same(model: nn.Module, folder: Path) -> bool:
    """Whether the artifact in ``folder`` has the weights of a model, and computes the same with them."""
    before, now = load_model(folder), model.state_dict()
    config, known = json.loads((folder / CONFIG).read_text()), before.state_dict()
    del config[KEY]
    return (
        config == json.loads(json.dumps(adapter_for(model).config(model)))
        and own_activations(before) == own_activations(model)
        and known.keys() == now.keys()
        and all(torch.equal(known[name], now[name].cpu()) for name in now)
    )


def _write_recipe(file: Path, recipe: Mapping[str, Any], effort: str) -> None:
    """Write a recipe; one that is there for the same model, data and effort stays, as it may have been edited."""
    if file.is_file():
        there = read_recipe(file)
        made_for = re.match(r"# effort (\w+);", file.read_text())
        check(
            made_for is None or made_for[1] == effort,
            f"{file}: is there already, of effort={'' if made_for is None else made_for[1]}; must be another "
            f"--output_dir for effort={effort}",
        )
        check(
            recipe["seed"] in (0, there.get("seed", 0)),
            f"{file}: is there already, of seed={there.get('seed', 0)}; must be another --output_dir for "
            f"seed={recipe['seed']}",
        )
        check(
            _subject(there) == _subject(recipe),
            f"{file}: is there already, for another model or other data; must be another --output_dir",
        )
        if there["phases"] != recipe["phases"] or there.get("shared") != recipe.get("shared"):
            say(f"{file} is another than this command would write, and is run as it is.", "yellow")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as aside:
        comment = f"# effort {effort}; python main.py chain --config {file} --output_dir {file.parent}\n"
        aside.write_text(comment + yaml.safe_dump(dict(recipe), sort_keys=False))


def _subject(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
    """The model and the data that a recipe is for: files, and what of them is read."""
    first = next(iter(recipe["phases"].values()))["model"]["init_args"]
    data = recipe["shared"]["data"]
    told = {
        name: value
        for name, value in data.get("init_args", {}).items()
        if name in ("source", "name", "model") or name.endswith(("column", "columns"))
    }
    return first.get("source"), first.get("init_from"), data["class_path"], told


def _set_and_measured(target: Target, folder: Path, given: Namespace) -> Compressed:
    """Save the model as it was wished for, measure that on the test split, and report."""
    artifact = read_artifact(folder / LAST / FOLDER)
    model, dense = load_model(artifact.path, dtype=given.dtype), load_model(artifact.path)
    merge_to_dense_(dense)
    path = budget_path(model)
    assert path is not None
    running = Running(given.dtype, given.optimize, given.against, given.batch_size)
    opening = _opened(folder, folder / WISHED)
    trainer: Any = opening.trainer

    def measure(budgets: Sequence[float]) -> tuple[Timing, Mapping[float, Timing]]:
        batches = timed_batches(model, opening.datamodule, given.batch_size)
        return measured_times(model, dense, batches, budgets, running)

    found = budget_for(target, path, measure)
    point = found.point
    set_taus_(model, path, point.taus)
    save_artifact(model, folder / WISHED, artifact.history, lambda aside: copy_processor(artifact.path, aside))
    sweep = TauSweep(budgets=[min(1.0, each.ffn_flops) for each in (point, path.dense)])
    trainer.callbacks = [sweep]
    with quiet_lightning():
        trainer.test(opening.model, datamodule=opening.datamodule, verbose=False)
    rows = sweep.rows["test"]
    seconds = {name: seconds_of(folder / name) for name in read_recipe(folder / RECIPE)["phases"]}
    page = write_report(folder, seconds, opening.model, str(target), point, rows, running, dense)
    say(f"{headline_of(target, found, rows, running)} The model: {folder / WISHED}. Report: {page}", "bold")
    return Compressed(folder, target, point, rows[0], rows[-1], path)


def headline_of(target: Target, found: Found, rows: Sequence[SweepRow], running: Running) -> str:
    """What was asked for and what came of it, in a sentence."""
    got, dense, promised = rows[0], rows[-1], found.point
    speed = "" if found.times_as_fast is None else f"{found.times_as_fast:.2f}x as fast as {running.rival}, "
    error = "" if got.standard_error is None else f" ± {got.standard_error:.2f}"
    return (
        f"{target}: {speed}{got.ffn_flops_percent:.1f}% of the FFNs' FLOPs, "
        f"{got.model_flops_percent:.1f}% of the model's, {got.metric.replace('_', ' ')} {got.score:.2f}{error} on test "
        f"(promised {promised.score:.2f}, with every expert on {dense.score:.2f})."
    )


def _opened(folder: Path, artifact: Path) -> PhaseCLI:
    """The last phase of the recipe in ``folder``, ready to evaluate ``artifact``."""
    config = phase_config(read_recipe(folder / RECIPE), LAST)
    return PhaseCLI(
        args=[
            *("--config", json.dumps(config)),
            f"--trainer.default_root_dir={folder / 'evaluation'}",
            "--trainer.logger=false",
            f"--model.init_args.init_from={artifact}",
            "--model.init_args.ffn_flops=null",  # as it was saved
        ],
        run=False,
    )
