"""A model on the meta device gets its tensors from a file."""

from pathlib import Path

import safetensors
from torch import Tensor, nn


def read_weights_(model: nn.Module, file: Path) -> None:
    """Give a model on the meta device the tensors in ``file`` as its own."""
    with safetensors.safe_open(str(file), framework="pt") as opened:
        # a copy: pages of the file stay no part of the model, whatever becomes of the file
        read = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        kept = {name: other for name, other in (opened.metadata() or {}).items() if other in read}
    names: dict[int, list[str]] = {}  # of each tensor, those that it has in the model: tied ones have several
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    tensors: dict[str, Tensor] = {}
    for same in names.values():
        source = next((name for name in same if name in read), kept.get(same[0]))
        if source is None:
            continue  # for load_state_dict to report
        original = model.get_parameter(same[0]) if _is_parameter(model, same[0]) else None
        tensor = read.pop(source) if source in read else tensors[source]
        if original is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=original.requires_grad)
        tensors.update(dict.fromkeys(same, tensor))
    model.load_state_dict({**tensors, **read}, strict=True, assign=True)


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(module)._parameters
