"""Files and folders that are never half-written: made aside, then renamed into place."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2dmoe_pl.errors import check


def is_file_name(name: Any) -> bool:
    """Whether ``name`` names something in a folder, and nothing outside of it, on every system.

    Example:
        >>> from d2dmoe_pl.whole_files import is_file_name
        >>> [is_file_name(name) for name in ("importance", "../importance", "C:importance", "..")]
        [True, False, False, False]
    """
    return isinstance(name, str) and re.fullmatch(r"[^\\/:\0]+", name) is not None and name.strip(". ") != ""


def expanded(path: str) -> str:
    """``path`` with ``~`` and variables as shells replace them, which Lightning does with the folders of loggers.

    Example:
        >>> from d2dmoe_pl.whole_files import expanded
        >>> expanded("~/runs").endswith("~/runs"), expanded("runs")
        (False, 'runs')
    """
    return os.path.expandvars(os.path.expanduser(path))


def named_folder(path: str, argument: str) -> Path:
    """The folder ``path``, :func:`expanded`.

    Args:
        path: As the user gave it.
        argument: What the user calls it.

    Raises:
        ConfigError: If it is empty, as a variable of a script may be, and files would go to wherever that was started.

    Example:
        >>> from d2dmoe_pl.whole_files import named_folder
        >>> named_folder("runs/digits", "output_dir").name
        'digits'
    """
    found = expanded(path)
    check(found.strip() != "", f"{argument}={path!r}: must be a folder's name; . is the one you are in")
    return Path(found)


@contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """Give the body a path beside ``file`` to write; once it is done, that takes the place of ``file``.

    Where the body fails or the process is killed, ``file`` is as it was.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from d2dmoe_pl.whole_files import replaced_file
        >>> file = Path(tempfile.mkdtemp()) / "status.json"
        >>> with replaced_file(file) as aside:
        ...     _ = aside.write_text("{}")
        >>> file.read_text()
        '{}'
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.partial")
    aside.unlink(missing_ok=True)  # it could lead elsewhere
    try:
        yield aside
        _to_disk(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give the body an empty folder beside ``folder`` to fill; once it is done, that takes the place of ``folder``.

    Everything in it has then reached the disk. Where the body fails or the process is killed, ``folder`` is as it was.
    """
    folder = folder.resolve()  # what a link leads to
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:  # also Ctrl-C; what is half-written would fill the disk, and is of no use
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for file in aside.rglob("*"):
        if file.is_file():
            _to_disk(file)
    if folder.exists():
        previous = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        aside.rename(folder)
        shutil.rmtree(previous)
    else:
        aside.rename(folder)


def replace_files(aside: Path, folder: Path, stems: Sequence[str], last: str) -> None:
    """Move the files in ``aside``, a folder in ``folder``, into that, in the place of those that are there.

    All others that are there stay, but for files of weights that belong to what was there before.

    Args:
        aside: Is gone in the end.
        folder: Gets the files, one after the other.
        stems: Names of files of weights, ``model`` of ``model.safetensors`` and its shards.
        last: The file that says what the others are, and comes when all of them are there.
    """
    names = "|".join(map(re.escape, stems))
    of_weights = re.compile(rf"({names})(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    new = {file.name for file in aside.iterdir()}
    for name in new - {last}:
        os.replace(aside / name, folder / name)
    for file in list(folder.iterdir()):
        if of_weights.fullmatch(file.name) and file.name not in new:
            file.unlink()
    os.replace(aside / last, folder / last)
    aside.rmdir()


def clean_up(folder: Path) -> None:
    """Remove what killed processes have left in ``folder`` of files and folders that they were replacing.

    A folder that was moved aside, and whose successor did not come to its place, comes back.
    """
    for left in list(folder.glob(".*.partial")):
        _remove(left)
    for left in list(folder.glob(".*.previous")):
        place = folder / left.name.removeprefix(".").removesuffix(".previous")
        if place.exists():
            _remove(left)
        else:
            left.rename(place)
    for left in list(folder.glob(".*.discarded")):
        _remove(left)


def discard(folder: Path) -> None:
    """Remove a folder with all that is in it; at no moment is it there with a part of that."""
    if not folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.discarded")
    _remove(aside)
    folder.rename(aside)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
