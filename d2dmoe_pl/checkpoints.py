"""What a phase goes on from after an interruption: files that are whole, and hold nothing that could run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from d2dmoe_pl.errors import check
from d2dmoe_pl.whole_files import replaced_file

FOLDER = "checkpoints"
LAST = "last.ckpt"
PREEMPTED = "hpc_ckpt_*.ckpt"  # what Lightning writes before a cluster takes the machine away
NEEDED = ("state_dict", "loops", "optimizer_states", "lr_schedulers")


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their place and renamed into it, so that the one before is there until then.

    The folder for temporary files, which can be on another disk, is not used, and no second copy is made in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint``; places that are no local paths are left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replaced_file(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a phase, the one to go on from first: the newest that was written to that end.

    Others, which a user's own callback keeps, follow, newest first.
    """
    own = [folder / FOLDER / LAST, *folder.glob(PREEMPTED)]
    others = [file for file in (folder / FOLDER).glob("*.ckpt") if file not in own]
    found = []
    for files in (own, others):
        there = [file for file in files if file.is_file()]
        found += sorted(there, key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return found


def why_unreadable(file: Path, needed: Sequence[str] = NEEDED) -> str | None:
    """What keeps a training from going on from a checkpoint, in words; None if nothing does.

    It is read whole, and nothing in it is run: tensors, numbers and texts are all that is taken.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers meet in a broken file
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    missing = [key for key in needed if not isinstance(checkpoint, Mapping) or key not in checkpoint]
    return f"has no {', '.join(missing)}" if missing else None


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Raise ``ConfigError`` if the file ``path``, where it is one, is no checkpoint."""
    why = why_unreadable(Path(path), ("state_dict",)) if Path(path).is_file() else None
    check(
        why is None,
        f"ckpt_path={str(path)!r}: is no checkpoint that this package wrote; must hold tensors, numbers and texts "
        f"only. One of a source that you trust with your machine is read with --weights_only false ({why})",
    )


def remove_checkpoints(folder: Path) -> None:
    """Remove from the folder of a phase what a training could go on from."""
    (folder / FOLDER / LAST).unlink(missing_ok=True)
    remove_preempted(folder)


def remove_preempted(folder: Path) -> None:
    """Remove what Lightning wrote for a cluster, once the phase is finished."""
    for file in folder.glob(PREEMPTED):
        file.unlink()
