"""What an artifact says of its model, under our key in ``config.json``: which parts there are, and of which kind."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from d2dmoe_pl.adapters import KEY
from d2dmoe_pl.errors import ConfigError, SettingTypeError, check, one_line
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, path_from_json
from d2dmoe_pl.moe.program_files import DESCRIPTION, OPERATORS, PROGRAMS
from d2dmoe_pl.structure import stage_of
from d2dmoe_pl.whole_files import is_file_name

PARTS = {
    "family": str,
    "layers": dict,
    "history": list,
    "tensors": list,
    "projections": dict,
    "quantized": list,
    "budgets": dict,
    "activations": dict,
    "types": dict,
}
# early artifacts and others have none
OPTIONAL = ("tensors", "projections", "quantized", "budgets", "activations", "types")
# of what is under our key; artifacts from before there were formats have none, dense ones are as in format 1
DENSE_FORMAT, CONVERTED_FORMAT, INT8_FORMAT, BUDGETS_FORMAT, ACTIVATIONS_FORMAT, CUTOFFS_FORMAT = 1, 2, 3, 4, 5, 6
GATE_CUTOFFS_FORMAT, HALFWAY_CUTOFFS_FORMAT = 7, 8
FORMAT = HALFWAY_CUTOFFS_FORMAT  # the newest


@dataclass
class PhaseRecord:
    """What one phase did: its class name, and its metrics by name."""

    phase: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Artifact:
    """The description of a saved model.

    Attributes:
        path: The folder.
        family: Name of its adapter.
        layers: What :func:`d2dmoe_pl.structure.describe` gave.
        history: The phases it went through, first to last.
        tensors: Names of the tensor files beside the weights, without their ending.
        projections: What :func:`d2dmoe_pl.moe.projections.describe_projections` gave.
        weights: The files of the weights.
        quantized: The modules that are in int8, by name.
        budgets: What ``BudgetCalibration`` found; None if it has not been run.
        activations: What :func:`d2dmoe_pl.moe.activations.own_activations` gave.
        types: What :func:`d2dmoe_pl.weights_types.types_beside_most` gave; None where it is not said, as in early ones.
    """

    path: Path
    family: str
    layers: dict[str, dict]
    history: list[PhaseRecord]
    tensors: list[str] = field(default_factory=list)
    projections: dict[str, dict] = field(default_factory=dict)
    weights: list[Path] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)
    budgets: BudgetPath | None = None
    activations: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] | None = None

    @property
    def stage(self) -> str:
        """``dense``, ``experts`` or ``routed``."""
        return stage_of(self.layers)

    @property
    def phase(self) -> str:
        """The phase that wrote it."""
        return self.history[-1].phase

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of the files named in ``tensors``."""
        return safetensors.torch.load_file(self.path / tensor_file(name))


def described(path: Path, made: Mapping[str, Any], weights: list[Path]) -> Artifact:
    """The artifact in ``path`` whose description, as of :func:`check_parts`, is ``made``."""
    history = [PhaseRecord(**record) for record in made["history"]]
    parts = {
        part: made[part] for part in ("tensors", "projections", "quantized", "activations", "types") if part in made
    }
    budgets = path_from_json(made["budgets"]) if "budgets" in made else None
    return Artifact(path, made["family"], made["layers"], history, weights=weights, budgets=budgets, **parts)


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Let what the body meets in an artifact that was edited, or put together from several, be told as that.

    Raises:
        ConfigError: For whatever shows that ``config.json`` and the weights beside it make no model.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError) and not isinstance(error, SettingTypeError):
            raise
        raise ConfigError(
            f"{path}: config.json and the weights beside it make no model ({type(error).__name__}: "
            f"{one_line(str(error))}); must be as they were written, and the libraries like those that wrote them"
        ) from error


def tensor_file(name: str) -> str:
    """The file of the tensors that are called ``name``."""
    return f"{name}.safetensors"


def format_of(made: Mapping[str, Any], is_converted: bool) -> int:
    """The oldest format in which all of ``made`` can be said."""
    cutoffs = [layer["cutoffs"] for layer in made["layers"].values() if "cutoffs" in layer]
    if any("halfway" in each for each in cutoffs):
        return HALFWAY_CUTOFFS_FORMAT
    if cutoffs:
        return GATE_CUTOFFS_FORMAT if any("gate_proj" in each for each in cutoffs) else CUTOFFS_FORMAT
    if made.get("activations"):
        return ACTIVATIONS_FORMAT
    if "budgets" in made or any("stand_in" in layer for layer in made["layers"].values()):
        return BUDGETS_FORMAT
    if "quantized" in made:
        return INT8_FORMAT
    return CONVERTED_FORMAT if is_converted else DENSE_FORMAT


def replaceable_folder(path: str | Path) -> Path:
    """The folder that an artifact is to take the place of.

    Raises:
        ConfigError: If it holds what is no artifact, which would be lost.
    """
    folder = Path(path)
    check(str(path).strip() != "", f"path={str(path)!r}: must be a folder's name")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        try:
            is_artifact = KEY in json.loads((folder / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            is_artifact = False
        check(
            is_artifact,
            f"path={str(path)!r}: is there, and no artifact; must be a new folder, an empty one, or an artifact, which "
            "is replaced with all that is in it",
        )
    return folder


def meant_below(folder: Path) -> str:
    """What may have been meant by a folder that is no artifact, to put behind that: those that a run left in it."""
    for place in ("model", "artifact", "*/artifact"):  # of ``compress``, of a phase, of a chain
        configs = sorted(folder.glob(f"{place}/config.json"))
        told = [str(each.parent) for each in configs if f'"{KEY}"' in each.read_text(errors="replace")]
        if told:
            return f"; did you mean {' or '.join(told)}?"
    return ""


def check_parts(made: Any, where: str) -> None:
    """Raise ``ConfigError`` unless an artifact's description has all of its parts, as they are written."""
    check(isinstance(made, dict), f"{where}: no artifact, the key {KEY!r} in config.json holds {type(made).__name__}")
    for part, kind in PARTS.items():
        is_there = part in made or part in OPTIONAL
        check(
            is_there and isinstance(made.get(part, kind()), kind),
            f"{where}: no artifact, {KEY}.{part} in config.json is missing or no {kind.__name__}",
        )
    for record in made["history"]:
        check(
            isinstance(record, dict) and "phase" in record and record.keys() <= {"phase", "metrics"},
            f"{where}: no artifact, {KEY}.history in config.json must hold records of phase and metrics",
        )
    check(bool(made["history"]), f"{where}: no artifact, {KEY}.history in config.json is empty")
    for name, activation in made.get("activations", {}).items():
        check(
            isinstance(activation, str),
            f"{where}: no artifact, {KEY}.activations in config.json says {activation!r} of {name}; must be a name",
        )
    for name in made.get("tensors", []):
        check(
            is_file_name(name),
            f"{where}: no artifact, {KEY}.tensors in config.json names {name!r}, which is no file in the folder",
        )


def copy_processor(artifact: Path, aside: Path) -> None:
    """Copy the tokenizer or image processor that lies beside the model in ``artifact`` into the folder ``aside``."""
    for file in artifact.iterdir():
        if file.is_dir():  # such as the pooling of sentence-transformers
            shutil.copytree(file, aside / file.name)
        elif file.suffix != ".safetensors" and file.name not in ("config.json", PROGRAMS, OPERATORS, DESCRIPTION):
            shutil.copy(file, aside / file.name)
