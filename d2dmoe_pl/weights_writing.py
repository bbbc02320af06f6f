"""A model's tensors go to files of safetensors, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.sharded_tensors import whole_on_cpu

MAX_SHARD_SIZE = 5 * 10**9  # bytes; as Hugging Face's libraries have it
INDEX = ".index.json"  # ending of the file that says which tensor is in which shard
DTYPES = {  # wide ones first
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}


def write_weights(model: nn.Module, folder: Path | None, name: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Write the tensors of ``model`` to the file ``name``, or, where they are larger, to shards with an index.

    No copy of the model is made: tensors are taken one after the other, sharded ones from all processes, each of which
    has to call this.

    Args:
        model: Whose state is written; tensors that are shared once.
        folder: What the files are written into; None on a process that only gives its part of them.
        name: Of the file, with its ending.
        max_shard_size: Bytes of a file; only a single tensor can be larger.

    Raises:
        ConfigError: For a size that is not positive, or a tensor of a type that such files do not have.
    """
    is_size = not isinstance(max_shard_size, str) and max_shard_size > 0  # transformers takes texts such as 5GB
    check(is_size, f"max_shard_size={max_shard_size!r}: must be positive, bytes as a number")
    names: dict[int, list[str]] = {}  # of each tensor: tied ones have several
    state = model.state_dict(keep_vars=True)
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for key, tensor in state.items():
        check(tensor.dtype in DTYPES, f"{key}: is of {tensor.dtype}, which safetensors lacks; must be of {allowed}")
        names.setdefault(id(tensor), []).append(key)
    kept = {min(same): sorted(same)[1:] for same in names.values()}
    shards: list[dict[str, Tensor]] = [{}]
    for key in kept:
        if shards[-1] and _size(shards[-1]) + state[key].nbytes > max_shard_size:
            shards.append({})
        shards[-1][key] = state[key]
    stem, ending = Path(name).stem, Path(name).suffix
    of = [f"{stem}-{number:05}-of-{len(shards):05}{ending}" for number in range(1, len(shards) + 1)]
    files = [name] if len(shards) == 1 else of
    for file, tensors in zip(files, shards, strict=True):
        ties = {other: key for key in tensors for other in kept[key]}
        _write(tensors, None if folder is None else folder / file, {"format": "pt", **ties})
    if len(files) > 1 and folder is not None:
        weight_map = {key: file for file, tensors in zip(files, shards, strict=True) for key in tensors}
        index = {"metadata": {"total_size": sum(map(_size, shards))}, "weight_map": weight_map}
        (folder / (name + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write(tensors: Mapping[str, Tensor], file: Path | None, metadata: Mapping[str, str]) -> None:
    """Write one file, as https://huggingface.co/docs/safetensors has it: a header, then all bytes in its order."""
    kinds = list(DTYPES)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))  # wide types first: aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    if file is None:
        for _ in _bytes(tensors, order, False):
            pass
        return
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in _bytes(tensors, order, True):
            opened.write(values)


def _bytes(tensors: Mapping[str, Tensor], order: list[str], wanted: bool) -> Iterator[Any]:
    for name in order:
        whole = whole_on_cpu(tensors[name], wanted)
        if whole is not None:
            values: Any = whole.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy()
            yield values


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
