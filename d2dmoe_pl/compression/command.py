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

from d2dmoe_pl.artifact import load_model, read_artifact, save_artifact
from d2dmoe_pl.artifact_parts import copy_processor
from d2dmoe_pl.callbacks.save_artifact import FOLDER, WISHED
from d2dmoe_pl.callbacks.sweep_table import SweepRow
from d2dmoe_pl.callbacks.tau_sweep import TauSweep
from d2dmoe_pl.chain import check_writable, quiet_lightning, run_chain
from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.chain_status import say, seconds_of
from d2dmoe_pl.compress_arguments import EFFORTS, compress_parser
from d2dmoe_pl.compression.recipe_for_model import recipe_for
from d2dmoe_pl.compression.target import Target, parse_target
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, budget_path, set_taus_
from d2dmoe_pl.parser_line import parser_line
from d2dmoe_pl.phase_cli import PhaseCLI
from d2dmoe_pl.phases._labels import answer_as_model
from d2dmoe_pl.recipe import phase_config, read_recipe
from d2dmoe_pl.report.measured_speed import measured_times
from d2dmoe_pl.report.writing import write_report
from d2dmoe_pl.whole_files import named_folder, replaced_file

RECIPE = "recipe.yaml"
LAST = "budget_calibration"  # the phase that finds budgets
STEPS = 9  # from the least to every expert on, whose speed is measured
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
    """

    folder: Path
    target: Target
    promised: BudgetPoint
    test: SweepRow
    dense: SweepRow

    def load(self) -> nn.Module:
        """The model."""
        return load_model(self.folder / WISHED)


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
    target = parse_target(given.target)
    check(given.effort in EFFORTS, f"effort={given.effort!r}: allowed are {', '.join(EFFORTS)}")
    check(given.batch_size > 0, f"batch_size={given.batch_size}: must be positive")
    folder = named_folder(given.output_dir, "output_dir")
    if given.print_config is None:
        check_writable(folder)
    recipe = recipe_for(given, target)
    if given.print_config is not None:
        print(yaml.safe_dump(recipe, sort_keys=False), end="")
        return None
    _write_recipe(folder / RECIPE, recipe, given.effort)
    arguments = [f"--config={folder / RECIPE}", f"--output_dir={folder}", f"--seed={given.seed}"]
    arguments += [] if given["from"] is None else [f"--from={given['from']}"]
    run_chain(chain_parser().parse_args(arguments))
    return _set_and_measured(target, folder, given)


def _kept(model: nn.Module, folder: Path) -> Path:
    """The artifact of a model in memory; one that phases began with must be of the same."""
    if not folder.is_dir() or not (folder.parent / RECIPE).is_file():
        save_artifact(model, folder)
        return folder
    before, now = load_model(folder).state_dict(), model.state_dict()
    same = before.keys() == now.keys() and all(torch.equal(before[name], now[name].cpu()) for name in now)
    check(same, f"{folder}: is of another model than the one that is given; must be another output_dir")
    return folder


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
            _subject(there) == _subject(recipe),
            f"{file}: is there already, for another model or other data; must be another --output_dir",
        )
        if there["phases"] != recipe["phases"] or there.get("shared") != recipe.get("shared"):
            say(f"{file} is another than this command would write, and is run as it is.", "yellow")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as aside:
        comment = f"# effort {effort}; python main.py chain --config {file}\n"
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
    model = load_model(artifact.path)
    path = budget_path(model)
    assert path is not None
    opening = _opened(folder, folder / WISHED)
    trainer: Any = opening.trainer
    point = _point(target, path, model, opening.datamodule, given.batch_size)
    set_taus_(model, path, point.taus)
    save_artifact(model, folder / WISHED, artifact.history, lambda aside: copy_processor(artifact.path, aside))
    sweep = TauSweep(budgets=[point.ffn_flops, path.dense.ffn_flops])
    trainer.callbacks = [sweep]
    with quiet_lightning():
        trainer.test(opening.model, datamodule=opening.datamodule, verbose=False)
    rows = sweep.rows["test"]
    seconds = {name: seconds_of(folder / name) for name in read_recipe(folder / RECIPE)["phases"]}
    page = write_report(folder, seconds, opening.model, str(target), point, rows)
    say(f"{headline_of(target, point, rows)} The model: {folder / WISHED}. Report: {page}", "bold")
    return Compressed(folder, target, point, rows[0], rows[-1])


def headline_of(target: Target, promised: BudgetPoint, rows: Sequence[SweepRow]) -> str:
    """What was asked for and what came of it, in a sentence."""
    got, dense = rows[0], rows[-1]
    error = "" if got.standard_error is None else f" ± {got.standard_error:.2f}"
    return (
        f"{target}: {got.ffn_flops_percent:.1f}% of the FFNs' FLOPs, {got.model_flops_percent:.1f}% of the model's, "
        f"{got.metric.replace('_', ' ')} {got.score:.2f}{error} on test (promised {promised.score:.2f}, with every "
        f"expert on {dense.score:.2f})."
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


def _point(target: Target, path: BudgetPath, model: nn.Module, data: TaskData, batch_size: int) -> BudgetPoint:
    """The budget that does what is wished for; the nearest that there is, which is said."""
    if path.in_percent and path.higher_is_better and path.dense.score <= 0:
        wish = (f"{target}", ", or a target in FLOPs") if target.kind == "drop" else (f"What {target} loses", "")
        say(
            f"{wish[0]} cannot be told here: {path.metric.replace('_', ' ')} is 0 with every expert on, so that no "
            f"setting is worse. Another metric of the data tells more{wish[1]}.",
            "yellow",
        )
    if target.kind == "drop":
        return path.at_drop(target.value)
    if target.kind == "speed":
        return _fast_enough(target.value, path, model, data, batch_size)
    least = getattr(path.points[-1], target.kind)
    if target.value < least:
        say(
            f"{target} cannot be reached: {100 * least:.1f}% is the least of this model, and what it is set to.",
            "yellow",
        )
    return path.at_cost(target.kind, max(target.value, least))


def _fast_enough(speed: float, path: BudgetPath, model: nn.Module, data: TaskData, batch_size: int) -> BudgetPoint:
    """The largest budget that is so many times as fast as dense, by times that are measured here."""
    least = path.points[-1].ffn_flops
    budgets = [least ** (1 - step / STEPS) for step in range(STEPS + 1)]
    data.setup()
    answer_as_model(data, model)
    loader: Any = data.drawn_loader("test", batch_size)
    batch = {key: value for key, value in next(iter(loader)).items() if key != "labels"}
    dense, times = measured_times(model, batch, budgets)
    check(
        not dense.is_noisy,
        f"target='speed={speed:g}x': this machine is too noisy to tell, the dense model's times are spread by "
        f"{dense.spread / dense.median:.0%}; stop what else runs, and run this again: nothing is trained anew",
    )
    found = {budget: dense.median / timing.median for budget, timing in times.items()}
    enough = [budget for budget, times_as_fast in found.items() if times_as_fast >= speed]
    if not enough:
        budget = max(found, key=lambda each: found[each])
        say(
            f"speed={speed:g}x cannot be reached here: {found[budget]:.2f}x is the most, and what it is set to.",
            "yellow",
        )
        return path.at_cost("ffn_flops", budget)
    return path.at_cost("ffn_flops", max(enough))
