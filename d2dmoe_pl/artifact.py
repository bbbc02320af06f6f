"""A model between phases: a folder that Hugging Face users recognise.

``config.json`` is the dense model's own, with one more key, ``d2dmoe``, for what was converted and how;
``model.safetensors`` holds the weights; a tokenizer or image processor lies beside them, and what a phase found out
about the model in safetensors files of its own. Nothing is pickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for, adapter_named
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.convert import describe, restore_, stage_of
from d2dmoe_pl.moe.projections import describe_projections, restore_projections_

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
KEY = "d2dmoe"


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
        layers: What :func:`d2dmoe_pl.moe.convert.describe` gave.
        history: The phases it went through, first to last.
        tensors: Names of the tensor files beside the weights, without their ending.
        projections: What :func:`d2dmoe_pl.moe.projections.describe_projections` gave.
    """

    path: Path
    family: str
    layers: dict[str, dict]
    history: list[PhaseRecord]
    tensors: list[str] = field(default_factory=list)
    projections: dict[str, dict] = field(default_factory=dict)

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
        return safetensors.torch.load_file(self.path / _tensor_file(name))


def save_artifact(
    model: nn.Module,
    path: str | Path,
    history: Sequence[PhaseRecord],
    save_processor: Callable[[Path], None] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write ``model`` to the folder ``path``, which is at no moment half-written.

    Args:
        model: A model at any stage.
        path: The folder; one that is there is replaced.
        history: The phases it went through, at least one.
        save_processor: Writes a tokenizer or image processor into the folder it is given.
        tensors: What else a phase found out about the model: by the name of a file, tensors by name.
    """
    path = Path(path)
    tensors = tensors or {}
    adapter = adapter_for(model)
    made = {
        "family": adapter.family,
        "projections": describe_projections(model),
        "layers": describe(model),
        "history": [asdict(record) for record in history],
        "tensors": sorted(tensors),
    }
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if save_processor is not None:
        save_processor(aside)
    adapter.save_beside(model, aside)
    _write_json(aside / CONFIG, {**adapter.config(model), KEY: made})
    # safetensors keeps one copy of tensors that are shared
    safetensors.torch.save_model(model, str(aside / WEIGHTS), metadata={"format": "pt"})
    for name, values in tensors.items():
        contiguous = {key: value.detach().cpu().clone() for key, value in values.items()}
        safetensors.torch.save_file(contiguous, str(aside / _tensor_file(name)))
    _publish(aside, path)


def read_artifact(path: str | Path, argument: str = "init_from") -> Artifact:
    """The description of the artifact in ``path``, after checking that it is whole.

    Raises:
        ConfigError: If there is no artifact, or a file of tensors in it is missing or truncated.
    """
    path = Path(path)
    check(path.is_dir(), f"{argument}={str(path)!r}: no such folder; must be the artifact that a phase wrote")
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{argument}={str(path)!r}: no artifact, {CONFIG} cannot be read ({error})") from None
    check(KEY in config, f"{argument}={str(path)!r}: no artifact, {CONFIG} has no key {KEY!r}")
    made = config[KEY]
    tensors = made.get("tensors", [])
    for file in (WEIGHTS, *map(_tensor_file, tensors)):
        try:
            with safetensors.safe_open(str(path / file), framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{argument}={str(path)!r}: {file} is missing or truncated ({error})") from None
    history = [PhaseRecord(**record) for record in made["history"]]
    return Artifact(path, made["family"], made["layers"], history, tensors, made.get("projections", {}))


def build_structure(artifact: Artifact) -> nn.Module:
    """The artifact's model on the meta device: shapes without weights."""
    with torch.device("meta"):
        model = build_dense(artifact)
        restore_(model, artifact.layers)
        return model


def build_dense(artifact: Artifact) -> nn.Module:
    """The artifact's model as it is before its FFNs become experts, weights not loaded."""
    model = adapter_named(artifact.family).build(artifact.path)
    restore_projections_(model, artifact.projections)
    return model


def load_model(path: str | Path) -> nn.Module:
    """The model saved in ``path``, at whatever stage, ready to run: ``load_model("runs/digits_vit/routers/artifact")``.

    Raises:
        ConfigError: If ``path`` is no whole artifact.
    """
    artifact = read_artifact(path, "path")
    model = build_dense(artifact)
    restore_(model, artifact.layers)
    safetensors.torch.load_model(model, str(artifact.path / WEIGHTS))
    return model.eval()


def record_metrics(path: str | Path, metrics: dict[str, float]) -> None:
    """Add metrics of the last phase to the artifact in ``path``."""
    file = Path(path) / CONFIG
    config = json.loads(file.read_text())
    config[KEY]["history"][-1]["metrics"].update(metrics)
    aside = file.with_name(f".{CONFIG}.partial")
    _write_json(aside, config)
    aside.replace(file)


def _tensor_file(name: str) -> str:
    return f"{name}.safetensors"


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _publish(aside: Path, path: Path) -> None:
    """Put the finished folder in place: a rename, after everything in it has reached the disk."""
    for file in aside.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    if path.exists():
        previous = path.with_name(f".{path.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
        aside.rename(path)
        shutil.rmtree(previous)
    else:
        aside.rename(path)
