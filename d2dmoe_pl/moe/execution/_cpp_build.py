"""C++ sources compiled on first use into torch's cache of extensions, for this machine's processor.

``torch.utils.cpp_extension.load`` does the same by way of ninja and setuptools, and a lock file that outlives a killed
process; one source needs neither.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch

from d2dmoe_pl.whole_files import replaced_file

_LOG = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """The compiler's own message, or what else stood in the way."""


def load_extension(name: str, source: Path) -> None:
    """Load the operators that ``source`` registers; compiled before, if this has not been done on this machine.

    Safe with several processes at once: one compiles, the others wait, and a process that is killed leaves nothing
    behind that a later one would trust. The compiler is ``CXX``, or ``c++``.

    Args:
        name: Of the library.
        source: The C++ file; headers beside it are part of it.

    Raises:
        CompileError: If there is no compiler, it fails, or the cache cannot be written.
    """
    try:
        torch.ops.load_library(str(_compiled(name, source)))
    except OSError as error:
        raise CompileError(str(error)) from error


def _compiled(name: str, source: Path) -> Path:
    command = _command()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = folder / f"{name}_{_version(command, source)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process dies
        if not library.exists():
            _LOG.warning("compiling %s, once on this machine: about half a minute", name)
            with replaced_file(library) as made:
                _run([*command[:1], str(source), *command[1:], "-o", str(made)])
    return library


def _command() -> list[str]:
    """The compiler and its arguments, without source and output."""
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in ("AVX2", "AVX512") else "DEFAULT"
    arguments = ["-shared", "-fPIC", "-std=c++20", "-O3", "-march=native", "-DNDEBUG"]
    arguments += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    arguments += ["-fopenmp"] if torch.backends.openmp.is_available() and platform.system() == "Linux" else []
    torch_folder = Path(torch.__file__).parent
    arguments += [f"-isystem{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    return [*shlex.split(os.environ.get("CXX", "c++")), *arguments, "-lc10", "-ltorch_cpu"]


def _version(command: list[str], source: Path) -> str:
    """Changes with whatever the library depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    parts = [torch.__version__, platform.machine(), *flags[:1], *command]
    parts += [file.read_text() for file in sorted(source.parent.iterdir()) if file.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(done.stderr.strip() or f"{command[0]} failed with exit code {done.returncode}")
