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

from d2dmoe_pl.errors import ConfigError, InterruptedPhaseError, NonFiniteLossError, NonFiniteWeightsError

LONGEST = 400  # characters of a reason that another library gives
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
REFUSALS = (MisconfigurationException, FileNotFoundError, RuntimeError, ValueError)  # of settings, by Lightning
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
    root = next(cause for cause in _causes(error) if not isinstance(cause, InterruptedPhaseError))
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


def one_line(text: str) -> str:
    """A text without its line ends, cut where it is long."""
    joined = " ".join(text.split())
    return joined if len(joined) <= LONGEST else joined[: LONGEST - 1] + "…"


def parser_line(text: str) -> str:
    """What jsonargparse says of a setting, as ``key=value: what is allowed``.

    Example:
        >>> from d2dmoe_pl.failures import parser_line
        >>> parser_line('Parser key "seed":' + chr(10) + "  Expected a <class 'int'>. Got value: x")
        "seed='x': must be int"
    """
    unknown = re.findall(r"unrecognized arguments: (.*)", text)
    if unknown:
        return f"{one_line(unknown[-1])}: no such setting; --help lists them, and --model.help=CLASS those of a class"
    missing = re.findall(r'Key "([^"]+)" is required', text)
    if missing:
        return f"{missing[-1]}: must be given, and is not"
    keys = list(re.finditer(r'Parser key "([^"]+)":?', text))
    if not keys:
        return one_line(text)
    rest = text[keys[-1].end() :]
    first = rest.strip().split("\n")[0]
    if "Got value:" in first:  # below, what encloses the setting says that it is not null either
        rest = first
    given = re.search(r"(?:Got value|Given value): (.*)", rest)
    key, value = keys[-1][1], given[1].strip() if given else ""
    nested = re.match(r"NestedArg\(key='([^']*)', val=(.*)\)$", value)
    if nested:
        key, value = f"{key}.{nested[1]}", nested[2].strip("'\"")
    name = f"{key}={value!r}" if 0 < len(value) < 80 else key
    expected = [
        _type_name(found) for found in re.findall(r"Expected an? (.*?)\.?(?: Got value.*)?$", rest, re.MULTILINE)
    ]
    kinds = [kind for kind in dict.fromkeys(expected) if kind]
    if kinds and kinds != ["null"]:
        return f"{name}: must be {' or '.join(kinds)}"
    return f"{name}: {one_line(_last_reason(rest) or rest)}"


def _last_reason(text: str) -> str:
    """Of several reasons, that which is not merely a type that the value has not."""
    reasons = [
        line.strip().removeprefix("- ")
        for line in text.splitlines()
        if line.strip()
        and not re.match(r"\s*(- Expected a <class|Given value|Subtypes|Errors|Does not validate)", line)
    ]
    return reasons[-1].split(" Got value:")[0] if reasons else ""


def _type_name(expected: str) -> str:
    """How a user writes values of a type that jsonargparse expects; empty where it is more than a word."""
    known = re.fullmatch(r"<class '([\w.]+)'>", expected)
    if known:
        return {"NoneType": "null", "bool": "true or false"}.get(known[1], known[1])
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", expected)
    return literal[1].replace("'", "") if literal else ""


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
