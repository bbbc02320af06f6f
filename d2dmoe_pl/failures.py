"""What ends a command, in one line: the setting, its value and what is allowed; and how the command exits."""

import errno
import pickle
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessRaisedException

from d2dmoe_pl.errors import ConfigError, InterruptedPhaseError, NonFiniteLossError, NonFiniteWeightsError, one_line
from d2dmoe_pl.parser_line import parser_line

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
REFUSALS = (
    MisconfigurationException,
    FileNotFoundError,
    ImportError,
    RuntimeError,
    ValueError,
)  # of settings, by Lightning
UNUSABLE = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
IN_PROCESS = re.compile(r"^(?:\w+\.)*ConfigError: (.*)\s*\Z", re.MULTILINE)  # at the end of a traceback
DISK_FULL = re.compile(r"no space left on device|disk quota exceeded|PytorchStreamWriter failed|unexpected pos \d+ vs")


@dataclass(frozen=True)
class Failure:
    """What is said of an error.

    Attributes:
        line: What is wrong, and what to do.
        code: The exit status: 2 for what a user has set wrongly, 1 for a run that broke off.
        is_known: Whether the line says all there is to know, so that the traceback is of no use.
    """

    line: str
    code: int = 1
    is_known: bool = True


def failure_of(error: BaseException) -> Failure:
    """What to say of ``error``.

    What a user can mend is found at its root, since parsers and loaders wrap what is raised below them.
    """
    for cause in _causes(error):
        if isinstance(cause, ConfigError):
            return Failure(_from_worker(str(cause)), 2)
        told = IN_PROCESS.search(str(cause)) if isinstance(cause, ProcessRaisedException) else None
        if told:
            return Failure(told[1], 2)
        if isinstance(cause, (NonFiniteLossError, NonFiniteWeightsError)):
            return Failure(str(cause))
    for cause in _causes(error):
        if isinstance(cause, InterruptedPhaseError):
            continue
        if type(cause).__name__ == "ArgumentError":
            return Failure(parser_line(str(cause)), 2)
        if isinstance(cause, REFUSALS) and _raised_in(cause).startswith("lightning."):
            return Failure(f"trainer: {one_line(str(cause))}", 2)
        known = _known(cause)
        if known is not None:
            return Failure(known)
    roots = [cause for cause in _causes(error) if not isinstance(cause, InterruptedPhaseError)]
    # a parser that makes an object says of what the object raises all that it tried besides
    root = next((cause for cause in roots if not _raised_in(cause).startswith("jsonargparse.")), roots[0])
    return Failure(f"{type(root).__name__}: {one_line(str(root))}", is_known=False)


def folder_of(error: BaseException) -> Path | None:
    """The folder of the phase that ``error`` broke off; None outside of one."""
    return next((cause.folder for cause in _causes(error) if isinstance(cause, InterruptedPhaseError)), None)


def write_traceback(error: BaseException, folder: Path | None) -> str:
    """Write the traceback of ``error`` to a new file in ``folder``, or where temporary files are; its path."""
    text = "".join(traceback.format_exception(error))
    for place in (folder, None):
        try:
            with NamedTemporaryFile(
                "w", dir=place, prefix="error-", suffix=".log", delete=False, encoding="utf-8"
            ) as file:
                file.write(text)
            return file.name
        except OSError:
            continue
    return "nowhere, since no file can be written"


def _known(error: BaseException) -> str | None:
    """What is said of a failure that has a known cause."""
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or OUT_OF_MEMORY.search(text):
        return f"out of memory: a smaller data.init_args.batch_size needs less ({one_line(text)[:120]})"
    if isinstance(error, pickle.UnpicklingError):
        return (
            "ckpt_path: is no checkpoint that this package wrote; must hold tensors, numbers and texts only. One of a "
            f"source that you trust with your machine is read with --weights_only false ({one_line(text)[:120]})"
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or DISK_FULL.search(text):
        return f"the disk is full: make room, or choose another output folder ({one_line(text)[:120]})"
    if isinstance(error, OSError) and error.filename is not None and error.errno in UNUSABLE:
        return f"{error.filename}: cannot be written or read ({error.strerror}); choose another folder or file"
    return None


def _raised_in(error: BaseException) -> str:
    """The name of the module that raised ``error``."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _from_worker(message: str) -> str:
    """The message itself, where a process that loads data has put its traceback around it."""
    if "Original Traceback" not in message:
        return message
    return message.rstrip().rpartition("ConfigError: ")[2]


def _causes(error: BaseException | None) -> list[Any]:
    """An error and all that it came of, outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
