"""The files of a model that is compiled ahead of time, and where they run."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.execution.cpu import operators_version

PROGRAMS = "programs.pt2"
CONSTANTS = "programs.safetensors"  # what programs read beside the model's own tensors
DESCRIPTION = "programs.json"  # written last: without it there are none
FORMAT = 1
ADVICE = "must be compiled here: main.py compile"


def read_description(folder: Path) -> dict[str, Any]:
    """What :func:`write_programs` said of its programs.

    Raises:
        ConfigError: If there are none, they are not as they were written, or were made for another machine or release.
    """
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(folder)!r}: has no programs, {DESCRIPTION} cannot be read ({error})") from None
    written = described.get("format") if isinstance(described, dict) else None
    check(written == FORMAT, f"{str(folder)!r}: has programs of format {written}; this release reads {FORMAT}")
    _check_made_here(described.get("made_on", {}), folder)
    is_whole = (folder / PROGRAMS).is_file() and checksum(folder / PROGRAMS) == described.get("checksum")
    check(is_whole, f"{str(folder)!r}: {PROGRAMS} is missing, or not as it was written; {ADVICE}")
    return described


def checksum(file: Path) -> str:
    """Of what is in ``file``; a library that is cut off ends the process that loads it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def made_on() -> dict[str, Any]:
    """What programs depend on: releases, and what the processor can do."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    # those that a compiler's -march=native makes use of
    able = sorted(
        flag for flag in flags if re.match(r"(avx|amx|fma|f16c|bmi|sse4|vaes|vpclmul|gfni|asimd|sve|bf16|i8mm)", flag)
    )
    return {
        "torch": torch.__version__,
        "operators": operators_version(),
        "machine": platform.machine(),
        "processor": able,
    }


def _check_made_here(made: Mapping[str, Any], folder: Path) -> None:
    here = made_on()
    for name, said in (
        ("torch", "PyTorch"),
        ("operators", "version of this package's operators"),
        ("machine", "processors"),
    ):
        check(
            made.get(name) == here[name],
            f"{str(folder)!r}: was compiled for {said} {made.get(name)}, and here is {here[name]}; {ADVICE}",
        )
    missing = sorted(set(made.get("processor", [])) - set(here["processor"]))
    check(
        not missing,
        f"{str(folder)!r}: was compiled for a processor with {', '.join(missing)}, which this one has not; {ADVICE}",
    )
