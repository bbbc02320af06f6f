"""One chain a folder: a second one is refused, and one that has died holds nothing."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.whole_files import replaced_file

LOCK, HOLDER = ".chain.lock", ".chain.holder.json"
ORPHANS = 15.0  # seconds in which loader processes notice that what made them has died; till then they hold its lock


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Let no other chain run in ``output_dir`` while the body does; the folder is made, and goes if it stays empty.

    Of a distributed run, the first process holds the lock for all.

    Raises:
        ConfigError: If another process holds it; it is named.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined] # Lightning sets it
        yield
        return
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / LOCK)
    _acquire(lock, output_dir)
    try:
        with replaced_file(output_dir / HOLDER) as aside:
            aside.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}))
        yield
    finally:
        (output_dir / HOLDER).unlink(missing_ok=True)
        (output_dir / LOCK).unlink(missing_ok=True)
        lock.release()
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _acquire(lock: FileLock, output_dir: Path) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        holder = _holder(output_dir)
    if holder is not None and holder["host"] == socket.gethostname() and not _is_alive(holder["pid"]):
        try:
            lock.acquire(timeout=ORPHANS)
            return
        except Timeout:
            pass
    who = "another process" if holder is None else "process {pid} on {host}, since {since}".format(**holder)
    raise ConfigError(
        f"output_dir={str(output_dir)!r}: a chain runs there already ({who}); must be another folder, or that chain "
        "ended first"
    )


def _holder(output_dir: Path) -> dict[str, Any] | None:
    try:
        read = json.loads((output_dir / HOLDER).read_text())
        return {"pid": int(read["pid"]), "host": str(read["host"]), "since": str(read["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
