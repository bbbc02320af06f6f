"""GGUF files of llama.cpp: whether one can be read as an ordinary model, told before its weights are."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer

from d2dmoe_pl.errors import ConfigError, check

ENDING = ".gguf"
PACKAGES = ("gguf", "accelerate")


@dataclass(frozen=True)
class Contents:
    """What a file holds, apart from its weights.

    Attributes:
        fault: Why it cannot be read; None if it can.
        scaled_positions: The tensor or key that says that rotary positions are scaled; None if they are not.
        num_weights: Of all but the layer that gives logits.
    """

    fault: str | None
    scaled_positions: str | None = None
    num_weights: int = 0


def folder_and_file(name: str) -> tuple[str, str]:
    """A path such as ``folder/model.gguf`` or ``organisation/name/model.gguf``, taken apart."""
    folder, _, file = name.rpartition("/")
    return folder or ".", file


def check_readable(folder: str, file: str, said: str) -> Contents:
    """What a file holds, after checking that it can be read.

    Args:
        folder: A folder, or a name on the hub, from which the file is downloaded.
        file: Its name there.
        said: The setting and its value, as the user knows them.

    Raises:
        OSError: If it is not on the hub, or that cannot be reached.
        ConfigError: If a package is missing; or the file is not in the folder, is no GGUF file, is truncated, holds
            tensors of a type that cannot be dequantised, or is a part of a model.
    """
    for package in PACKAGES:
        check(
            find_spec(package) is not None,
            f"{said}: the package {package} is not installed; pip install {' '.join(PACKAGES)}",
        )
    if Path(folder).is_dir() and not (Path(folder) / file).is_file():
        there = ", ".join(sorted(each.name for each in Path(folder).glob(f"*{ENDING}"))) or "none"
        raise ConfigError(f"{said}: no such file; the GGUF files in {folder} are: {there}")
    path = str(resolve_name("transformers.utils:cached_file")(folder, file))
    status = Path(path).stat()
    contents = _contents(path, status.st_size, status.st_mtime_ns)
    check(contents.fault is None, f"{said}: {contents.fault}")
    return contents


def check_positions(config: Any, contents: Contents, said: str) -> None:
    """Raise ``ConfigError`` if a file scales rotary positions, and the config made of it does not."""
    rotary: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    is_scaled = contents.scaled_positions is not None and rotary.get("rope_type", "default") == "default"
    check(
        not is_scaled,
        f"{said}: scales its rotary positions ({contents.scaled_positions}), which transformers does not read from "
        "GGUF; must be another file, or the model as it was before",
    )


def check_taken(model: Any, contents: Contents, said: str) -> None:
    """Raise ``ConfigError`` if a file holds more than the model made of it, since transformers leaves out the rest."""
    taken = {id(tensor): tensor.numel() for tensor in model.base_model.state_dict(keep_vars=True).values()}
    left = contents.num_weights - sum(taken.values())
    check(
        left <= 0,
        f"{said}: holds {left} weights that {type(model).__name__} has not, e.g. biases, and would be left out; must "
        "be another file, or the model as it was before",
    )


def dense_loading() -> dict[str, Any]:
    """The arguments of ``from_pretrained`` by which nothing in a model stays quantised."""
    if not hasattr(transformers, "GgufConfig"):  # earlier versions leave nothing quantised
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def without_foreign_tokens(tokenizer: Any) -> Any:
    """A tokenizer of a file without the tokens that transformers adds to it, which no model of the file embeds.

    To what is like GPT-2's it adds ``<|endoftext|>``, whether the file has it or not.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["id"] < tokenizer.vocab_size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(made))
    return tokenizer


@lru_cache(maxsize=8)
def _contents(path: str, size: int, time: int) -> Contents:
    """What a file of this size and time holds."""
    gguf: Any = import_module("gguf")  # optional
    with open(path, "rb") as opened:
        if opened.read(4) != b"GGUF":
            return Contents("is no GGUF file; must be one")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
        if unknown is not None:
            return Contents(f"has tensors of type {unknown[1]}, which gguf does not know; must be requantised")
        return Contents(f"is truncated or broken ({str(error).splitlines()[0]}); must be downloaded or written anew")
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.parts[parts.data[0]][0]) > 1:
        return Contents("is a part of a model; must be all of it, which llama-gguf-split --merge makes")
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            gguf.dequantize(np.atleast_1d(tensor.data)[:1], tensor.tensor_type)
        except NotImplementedError:
            return Contents(
                f"has tensors of type {tensor.tensor_type.name} ({tensor.name}), which cannot be dequantised; must be "
                "requantised"
            )
    others = [tensor for tensor in reader.tensors if not tensor.name.startswith(("output.", "rope_"))]
    return Contents(None, _scaled_positions(reader), sum(int(tensor.n_elements) for tensor in others))


def _scaled_positions(reader: Any) -> str | None:
    scaled = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and bytes(field.parts[field.data[0]]) != b"none":
            scaled.append(name)
    return scaled[0] if scaled else None
