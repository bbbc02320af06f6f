"""A model on the meta device gets its tensors from files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
from torch import Tensor, nn

from d2dmoe_pl.artifact_parts import as_written
from d2dmoe_pl.errors import ConfigError, check, said_of
from d2dmoe_pl.moe.find_layers import check_not_adapted
from d2dmoe_pl.weights_types import check_types
from d2dmoe_pl.weights_writing import INDEX
from d2dmoe_pl.whole_files import is_file_name


def weight_files(folder: Path, name: str, where: str) -> list[Path]:
    """The files that hold the weights in ``folder``: ``name``, or the shards that its index names.

    Raises:
        ConfigError: If there is an index that names no files.
    """
    index = folder / (name + INDEX)
    if (folder / name).exists() or not index.exists():
        return [folder / name]
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: no artifact, {index.name} cannot be read ({error})") from None
    for file in files:
        check(is_file_name(file), f"{where}: no artifact, {index.name} names {file!r}, which is no file in the folder")
    return [folder / file for file in files]


def read_weights_(
    model: nn.Module, files: Sequence[Path], mapped: bool = False, types: Mapping[str, str] | None = None
) -> None:
    """Give a model on the meta device the tensors in ``files``, as its own or, if ``mapped``, as pages of the files.

    Args:
        model: Its structure.
        files: In one folder.
        mapped: Whether tensors stay pages of the files.
        types: Of the tensors that are of another floating type than most, as written; None where that is not known.

    Raises:
        ConfigError: If they are not those of the model.
    """
    read: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for file in files:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            there = list(opened.keys())
            ties |= opened.metadata() or {}
        for name in there:
            # opened anew, since pages of the file that have been read count as memory until it is closed
            with safetensors.safe_open(str(file), framework="pt") as opened:
                # a copy: pages of the file stay no part of the model, whatever becomes of the file
                read[name] = opened.get_tensor(name) if mapped else opened.get_tensor(name).clone()
    folder = files[0].parent
    check_types(read, model.state_dict(), types, folder)
    with as_written(folder):
        _take_(model, read, ties)


def _take_(model: nn.Module, read: dict[str, Tensor], ties: Mapping[str, str]) -> None:
    kept = {name: other for name, other in ties.items() if other in read}
    names: dict[int, list[str]] = {}  # of each tensor, those that it has in the model: tied ones have several
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    tensors: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}  # by the name that the files have it by
    for same in names.values():
        source = next((name for name in same if name in read or name in taken), kept.get(same[0]))
        if source is None:
            continue  # for load_state_dict to report
        original = model.get_parameter(same[0]) if _is_parameter(model, same[0]) else None
        tensor = taken[source] if source in taken else read.pop(source)
        if original is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=original.requires_grad)
        taken[source] = tensor
        tensors.update(dict.fromkeys(same, tensor))
    model.load_state_dict({**tensors, **read}, strict=True, assign=True)


def check_takes_weights(made: nn.Module, model: nn.Module) -> None:
    """Raise ``ConfigError`` unless ``made``, on the meta device, has tensors of the names and shapes of ``model``'s."""
    check_not_adapted(dict(model.named_modules()))
    for name, value in model.state_dict().items():
        check(
            isinstance(value, Tensor),
            f"{type(model).__name__}: has {name}, which is {said_of(value)} and no tensor, as other libraries keep "
            "what they quantise; must be of tensors alone, and put into int8 by quantize_",
        )
    wanted, there = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (made, model))
    for name in dict.fromkeys((*there, *wanted)):
        is_known = wanted.get(name) == there.get(name)
        check(
            is_known,
            f"{type(model).__name__}: has {name} of shape {there.get(name)}, where one made by its config has "
            f"{wanted.get(name)}, so that it could not be loaded; change the config, or keep the state_dict",
        )


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(module)._parameters
