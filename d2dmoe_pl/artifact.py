"""A model between phases: a folder that Hugging Face users recognise.

``config.json`` is the dense model's own, with one more key, ``d2dmoe``, for what was converted and how;
``model.safetensors`` holds the weights, large ones in shards with an index; a tokenizer or image processor lies beside
them, and what a phase found out about the model in safetensors files of its own. Nothing is pickled. A converted model
is none that its library knows: its ``model_type`` is ``d2dmoe``, and its weights are in ``d2dmoe.safetensors``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import KEY, adapter_for, adapter_named
from d2dmoe_pl.artifact_parts import (
    CONVERTED_FORMAT,
    FORMAT,
    Artifact,
    PhaseRecord,
    as_written,
    check_parts,
    described,
    format_of,
    meant_below,
    replaceable_folder,
    tensor_file,
)
from d2dmoe_pl.auto_classes import MODEL_TYPE
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.finite_weights import check_finite
from d2dmoe_pl.free_memory import check_fits
from d2dmoe_pl.hub_folders import local_folder
from d2dmoe_pl.moe.activations import own_activations, restore_activations_
from d2dmoe_pl.moe.budgets.budget_path import budget_path, set_budget_path_
from d2dmoe_pl.moe.find_layers import check_weights_are_here
from d2dmoe_pl.moe.optimization import optimize_
from d2dmoe_pl.moe.projections import describe_projections, restore_projections_
from d2dmoe_pl.moe.quantization.int8_layers import quantized_names
from d2dmoe_pl.moe.quantization.quantize import quantize_, restore_quantized_
from d2dmoe_pl.parts_without_weights import check_same_parts
from d2dmoe_pl.sharded_tensors import is_sharded
from d2dmoe_pl.structure import describe, restore_
from d2dmoe_pl.weights_reading import check_takes_weights, read_weights_, weight_files
from d2dmoe_pl.weights_types import types_beside_most
from d2dmoe_pl.weights_writing import MAX_SHARD_SIZE, write_weights
from d2dmoe_pl.whole_files import is_file_name, replaced_file, replaced_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# of a converted model: libraries that do not know it shall find no weights, rather than those of all but the FFNs
CONVERTED_WEIGHTS = "d2dmoe.safetensors"
DTYPES = ("float32", "bfloat16", "float16", "int8")  # to load a model in
IN_CODE = "code"  # stands for the phase where there was none


def save_artifact(
    model: nn.Module,
    path: str | Path,
    history: Sequence[PhaseRecord] = (),
    save_processor: Callable[[Path], None] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write ``model`` to the folder ``path``, which is at no moment half-written.

    Of a model that is sharded, every process must call this; the first writes, and is given a tensor at a time.

    Args:
        model: A model at any stage.
        path: The folder; an artifact that is there is replaced.
        history: The phases it went through; a model converted in code has gone through none.
        save_processor: Writes a tokenizer or image processor into the folder it is given.
        tensors: What else a phase found out about the model: by the name of a file, tensors by name.
        max_shard_size: Bytes; larger weights are in several files, with an index, as Hugging Face's libraries do it.

    Raises:
        ConfigError: For a folder of something else, a size not positive, names no file can have, unknown types, or a
            model with other parts than its config says, such as a head of one's own, which nobody could load.
        NonFiniteWeightsError: If a parameter, or one of the tensors, holds a NaN or an infinity.

    Example:
        >>> import os, tempfile, transformers
        >>> from d2dmoe_pl import save_artifact
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> folder = tempfile.mkdtemp() + "/artifact"
        >>> save_artifact(transformers.GPT2LMHeadModel(config), folder)
        >>> sorted(os.listdir(folder))
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    path = replaceable_folder(path)
    tensors = tensors or {}
    for name in tensors:
        check(is_file_name(name), f"tensors: {name!r} is no name of a file in the folder")
    check_weights_are_here(model)
    unread = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    check(unread is None, f"{type(model).__name__}: {unread} is on the meta device, without values; must be loaded")
    advice = f"{path} is not written"
    check_finite(model.named_parameters(), "the weights", advice)
    for name, values in tensors.items():
        check_finite(values.items(), f"the tensors of {name}", advice)
    weights = CONVERTED_WEIGHTS if is_converted(model) else WEIGHTS
    if is_sharded(model) and torch.distributed.get_rank() > 0:
        write_weights(model, None, weights, max_shard_size)
        return
    with replaced_folder(path) as aside:
        if save_processor is not None:
            save_processor(aside)
        _write_description(model, aside, history, sorted(tensors))
        write_weights(model, aside, weights, max_shard_size)
        for name, values in tensors.items():
            contiguous = {key: value.detach().cpu().clone() for key, value in values.items()}
            safetensors.torch.save_file(contiguous, str(aside / tensor_file(name)))


def check_can_be_saved(model: nn.Module) -> None:
    """Raise ``ConfigError`` if :func:`save_artifact` could not save ``model``, before it is trained for long."""
    adapter = adapter_for(model)
    adapter.config(model)
    parts = own_activations(model), describe_projections(model), describe(model), quantized_names(model)
    with torch.device("meta"):
        made = adapter.rebuild(model)
        _restore_parts_(made, *parts)
    check_takes_weights(made, model)
    check_same_parts(made, model)


def _write_description(model: nn.Module, folder: Path, history: Sequence[PhaseRecord], tensors: list[str]) -> None:
    """Write all but weights, once a model that is made by it is found to be of the same parts."""
    adapter = adapter_for(model)
    converted, config, quantized = is_converted(model), adapter.config(model), quantized_names(model)
    activations, budgets = own_activations(model), budget_path(model)
    made: dict[str, Any] = {
        "family": adapter.family,
        "projections": describe_projections(model),
        "layers": describe(model),
        "history": [asdict(record) for record in history or [PhaseRecord(IN_CODE)]],
        "tensors": tensors,
        "types": types_beside_most(model.state_dict()),
    }
    if quantized:
        made["quantized"] = quantized
    if budgets is not None:
        made["budgets"] = budgets.as_json()
    if activations:
        made["activations"] = activations
    made["format"] = format_of(made, converted)
    if converted and "model_type" in config:
        made["model_type"], config["model_type"] = config["model_type"], MODEL_TYPE
    adapter.save_beside(model, folder)
    _write_json(folder / CONFIG, {**config, KEY: made})
    loaded = _structure(described(folder, made, []))
    check_takes_weights(loaded, model)
    check_same_parts(loaded, model)


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` is another than its own config says, by experts, projections, int8 or activations."""
    return bool(describe(model) or describe_projections(model) or quantized_names(model) or own_activations(model))


def read_artifact(path: str | Path, argument: str = "init_from") -> Artifact:
    """The description of the artifact in ``path``, after checking that it is whole.

    Raises:
        ConfigError: If there is no artifact, what it says is none of a model, a file of tensors in it is missing or
            truncated, or it was written by a newer version of this package.
    """
    path = Path(path)
    check(path.is_dir(), f"{argument}={str(path)!r}: no such folder; must be the artifact that a phase wrote")
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        close = meant_below(path)
        raise ConfigError(f"{argument}={str(path)!r}: no artifact, {CONFIG} cannot be read ({error}){close}") from None
    is_one = isinstance(config, dict) and KEY in config
    check(is_one, f"{argument}={str(path)!r}: no artifact, {CONFIG} has no key {KEY!r}")
    made = config[KEY]
    written = made.get("format", 0) if isinstance(made, dict) else 0
    check(
        isinstance(written, int) and written <= FORMAT,
        f"{argument}={str(path)!r}: has format {written}, that of a newer d2dmoe_pl; this one reads formats up to "
        f"{FORMAT}",
    )
    check_parts(made, f"{argument}={str(path)!r}")
    tensors = made.get("tensors", [])
    weights_file = CONVERTED_WEIGHTS if written >= CONVERTED_FORMAT else WEIGHTS
    weights = weight_files(path, weights_file, f"{argument}={str(path)!r}")
    for file in (*weights, *(path / tensor_file(name) for name in tensors)):
        try:
            with safetensors.safe_open(str(file), framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{argument}={str(path)!r}: {file.name} is missing or truncated ({error})") from None
    with as_written(path):
        return described(path, made, weights)


def build_structure(artifact: Artifact) -> nn.Module:
    """The artifact's model on the meta device: shapes without weights.

    Raises:
        ConfigError: If its description is none of a model.
    """
    with as_written(artifact.path):
        return _structure(artifact)


def _structure(artifact: Artifact) -> nn.Module:
    with torch.device("meta"):
        model = adapter_named(artifact.family).build(artifact.path)
        _restore_parts_(model, artifact.activations, artifact.projections, artifact.layers, artifact.quantized)
    set_budget_path_(model, artifact.budgets)
    if is_converted(model):
        adapter_named(artifact.family).mark_converted_(model)
    return model


def _restore_parts_(model: nn.Module, activations: Any, projections: Any, layers: Any, quantized: Any) -> None:
    """Give a dense model what an artifact says of each."""
    restore_activations_(model, activations)
    restore_projections_(model, projections)
    restore_(model, layers)
    if quantized:
        restore_quantized_(model, quantized)


def load_model(
    path: str | Path,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    optimize: bool = False,
    mapped: bool = False,
) -> nn.Module:
    """The model saved in ``path``, at whatever stage, ready to run, on the CPU.

    Args:
        path: A folder; or, where there is none, a name on the Hugging Face hub such as ``organisation/name``.
        revision: Of a model on the hub: a branch, a tag or a commit.
        dtype: ``float32``, ``bfloat16`` or ``float16``, which weights are cast to, or ``int8``, by
            :func:`d2dmoe_pl.quantize_`; as they were saved if not given. What was saved in int8 stays so.
        optimize: Whether it is made fast by :func:`d2dmoe_pl.optimize_`.
        mapped: Whether weights stay pages of their files, which several processes share, until they are changed; those
            must then stay as they are. For a model of which a process keeps a part.

    Raises:
        ConfigError: If ``path`` is no whole artifact, that of a newer version of this package, or a name that the hub
            does not have or cannot be reached for; for another ``dtype``; or if the model is larger than the memory
            that is free.

    Example:
        >>> import tempfile, timm
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, load_model, save_artifact
        >>> model = timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1)
        >>> model.model_args = {"embed_dim": 12, "depth": 1, "num_heads": 1}
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> folder = tempfile.mkdtemp() + "/artifact"
        >>> save_artifact(model, folder)
        >>> load_model(folder).blocks[0].mlp.experts
        Experts(
          num_experts=4, expert_dim=12, d_model=12
          (activation): GELU(approximate='none')
          (hidden_dropout): Dropout(p=0.0, inplace=False)
        )
    """
    name = str(dtype).removeprefix("torch.")
    check(dtype is None or name in DTYPES, f"dtype={name!r}: allowed are {', '.join(DTYPES)}")
    artifact = read_artifact(local_folder(path, revision), "path")
    model = build_structure(artifact)
    target = None if dtype is None or name == "int8" else getattr(torch, name)
    if not mapped or dtype is not None:  # pages of files give way to whatever else needs the memory
        check_fits(model, f"path={str(path)!r}, dtype={None if dtype is None else name!r}", target)
    read_weights_(model, artifact.weights, mapped, artifact.types)
    adapter_named(artifact.family).fill_buffers_(model)
    if target is not None:
        adapter_named(artifact.family).cast_(model, target)
    elif name == "int8" and not artifact.quantized:
        quantize_(model)
    if optimize:
        optimize_(model)
    return model.eval()


def record_metrics(path: str | Path, metrics: dict[str, float]) -> None:
    """Add metrics of the last phase to the artifact in ``path``."""
    file = Path(path) / CONFIG
    config = json.loads(file.read_text())
    config[KEY]["history"][-1]["metrics"].update(metrics)
    with replaced_file(file) as aside:
        _write_json(aside, config)


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
