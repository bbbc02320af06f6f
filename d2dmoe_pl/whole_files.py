"""Files and folders that are never half-written: made aside, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
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


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
