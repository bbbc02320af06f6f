"""Whether a model fits into the memory that is free, asked before it is loaded."""

import re
from pathlib import Path

import torch
from torch import nn

from d2dmoe_pl.errors import check

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container, that may have less than the machine
GB = 10**9


def check_fits(model: nn.Module, said: str, dtype: torch.dtype | None = None) -> None:
    """Raise ``ConfigError`` if a model's weights are larger than the memory that is free.

    Args:
        model: On the meta device, so that it takes none itself.
        said: The setting that the model comes from, and its value.
        dtype: To which its weights will be cast; None for their own.
    """
    size = torch.empty((), dtype=dtype).itemsize if dtype is not None and dtype.is_floating_point else 0
    tensors = [*model.parameters(), *model.buffers()]
    needed = sum(tensor.numel() * max(tensor.itemsize, size) for tensor in tensors)
    free = free_memory()
    check(
        free is None or needed <= free,
        f"{said}: needs {needed / GB:.1f} GB of memory for its weights; must be at most the {(free or 0) / GB:.1f} GB "
        "that are free",
    )


def free_memory() -> int | None:
    """Bytes of memory that can still be taken, what can be swapped out included; None where the system says nothing."""
    try:
        found = _numbers(MEMINFO)
        free = (found["MemAvailable"] + found["SwapFree"]) * 1024
    except (OSError, KeyError):
        return None
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, limit - used + _numbers(GROUP / "memory.stat")["inactive_file"])
    except (OSError, KeyError, ValueError):  # there is no limit
        return free


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", file.read_text(), re.MULTILINE)}
