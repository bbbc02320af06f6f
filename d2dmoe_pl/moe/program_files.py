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
from d2dmoe_pl.moe.execution.cpu import compile_failure, operators_version, take_operators

PROGRAMS = "programs.pt2"
OPERATORS = "programs.so"  # of this package, which programs call
CONSTANTS = "programs.safetensors"  # what programs read beside the model's own tensors
DESCRIPTION = "programs.json"  # written last: without it there are none
FORMAT = 2
ADVICE = "must be compiled here: main.py compile"


def ready_programs(folder: Path) -> dict[str, Any]:
    """What :func:`write_programs` said of its programs, whose operators this process has from here on.

    Raises:
        ConfigError: If there are none, they are not as they were written, or were made for another machine or release;
            or if their operators cannot be loaded here, and cannot be compiled either.
    """
    described = _read_description(folder)
    try:
        take_operators(folder / OPERATORS)
    except OSError as error:
        failure = compile_failure()
        check(
            failure is None,
            f"{str(folder)!r}: its operators cannot be loaded ({error}), and the compiler says: {failure}",
        )
    return described


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(folder)!r}: has no programs, {DESCRIPTION} cannot be read ({error})") from None
    written = described.get("format") if isinstance(described, dict) else None
    check(written == FORMAT, f"{str(folder)!r}: has programs of format {written}; this release reads {FORMAT}")
    _check_made_here(described.get("made_on", {}), folder)
    for name in (PROGRAMS, OPERATORS):
        is_whole = (folder / name).is_file() and checksum(folder / name) == described.get("checksums", {}).get(name)
        check(is_whole, f"{str(folder)!r}: {name} is missing, or not as it was written; {ADVICE}")
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
