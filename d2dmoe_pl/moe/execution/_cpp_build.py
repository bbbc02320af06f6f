"""C++ sources compiled on first use, for this machine's processor, into a folder of the user's own.

``torch.utils.cpp_extension.load`` does the same by way of ninja and setuptools, and a lock file that outlives a killed
process; one source needs neither.
"""

import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock

from d2dmoe_pl.whole_files import replaced_file

SLOWEST = 900.0  # seconds that a compiler may take
_LOG = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """The compiler's own message, or what else stood in the way."""


def load_extension(name: str, source: Path) -> None:
    """Load the operators that ``source`` registers; compiled before, if this has not been done on this machine.

    Safe with several processes at once: one compiles, the others wait, and a process that is killed leaves nothing
    behind that a later one would trust. What is loaded is in a folder that only its user can write to, and as it was
    compiled. The compiler is ``CXX``, or ``c++``.

    Args:
        name: Of the library.
        source: The C++ file; headers beside it are part of it.

    Raises:
        CompileError: If there is no compiler, it fails, or no folder can be written.
    """
    try:
        library = compiled_extension(name, source)
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            _LOG.warning("%s cannot be loaded (%s): it is compiled anew", library.name, error)
            _forget(library)
            torch.ops.load_library(str(compiled_extension(name, source)))
    except OSError as error:
        raise CompileError(str(error)) from error


def compiled_extension(name: str, source: Path) -> Path:
    """The library that :func:`load_extension` loads, which is compiled if need be; its arguments and errors."""
    try:
        command = _command()
        return _compiled(f"{name}_{_version(command, source)}", source, command)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise CompileError(str(error)) from error


def _compiled(name: str, source: Path, command: list[str]) -> Path:
    library = _folder() / f"{name}.so"
    if _is_whole(library):
        return library
    with FileLock(library.with_suffix(".lock")):  # the system releases it if the process dies
        if not _is_whole(library):
            if library.exists():
                _LOG.warning("%s is not as it was compiled: it is compiled anew", library.name)
            _LOG.warning("compiling %s, once on this machine: about half a minute", name)
            _forget(library)
            with replaced_file(library) as made:
                _run([*command[:1], str(source), *command[1:], "-o", str(made)])
            with replaced_file(_checksum_file(library)) as made:
                made.write_text(_checksum(library))
    return library


def _folder() -> Path:
    """The first folder for compiled libraries that is this user's alone, or can be made so."""
    refused = []
    for base in _bases():
        folder = base / "d2dmoe_pl" if not hasattr(os, "getuid") else base / f"d2dmoe_pl_{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            reason = _why_not_private(folder)
        except OSError as error:
            reason = str(error)
        if reason is None:
            return folder
        refused.append(f"{folder}: {reason}")
    raise CompileError(f"no folder for compiled libraries ({'; '.join(refused)})")


def _bases() -> Iterator[Path]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        yield Path(given)
    with suppress(RuntimeError):  # there is no home
        yield Path.home() / ".cache" / "torch_extensions"
    yield Path(tempfile.gettempdir())


def _why_not_private(path: Path) -> str | None:
    """What lets others than this user change a file or folder; None if nothing does."""
    if not hasattr(os, "getuid"):  # Windows gives each user folders of their own
        return None
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_uid != os.getuid():
        return "is another user's"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by others"
    return None


def _is_whole(library: Path) -> bool:
    """Whether a library is there as it was compiled; one that is cut off ends the process that loads it."""
    file = _checksum_file(library)
    if not (library.is_file() and file.is_file()) or _why_not_private(library) or _why_not_private(file):
        return False
    return file.read_text() == _checksum(library)


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _forget(library: Path) -> None:
    for file in (_checksum_file(library), library):
        file.unlink(missing_ok=True)


def _command() -> list[str]:
    """The compiler and its arguments, without source and output."""
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in ("AVX2", "AVX512") else "DEFAULT"
    arguments = ["-shared", "-fPIC", "-std=c++20", "-O3", "-march=native", "-DNDEBUG"]
    arguments += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    arguments += ["-fopenmp"] if torch.backends.openmp.is_available() and platform.system() == "Linux" else []
    torch_folder = Path(torch.__file__).parent
    arguments += [f"-isystem{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    return [*(shlex.split(os.environ.get("CXX", "")) or ["c++"]), *arguments, "-lc10", "-ltorch_cpu"]


def _version(command: list[str], source: Path) -> str:
    """Changes with whatever the library depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    parts = [torch.__version__, platform.machine(), *flags[:1], *command]
    parts += [file.read_text() for file in sorted(source.parent.iterdir()) if file.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SLOWEST)
    if done.returncode != 0:
        raise CompileError(done.stderr.strip() or f"{command[0]} failed with exit code {done.returncode}")
