"""Folders that are there, or that the Hugging Face hub has."""

import re
from pathlib import Path

import huggingface_hub

from d2dmoe_pl.errors import ConfigError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder ``path``, downloaded first if that is no folder but the name of a model on the hub.

    Args:
        path: A folder, or a name such as ``organisation/name``.
        revision: Of a model on the hub: a branch, a tag or a commit.

    Raises:
        ConfigError: If the hub does not have it or cannot be reached.
    """
    if Path(path).is_dir() or not HUB_NAME.fullmatch(str(path)):
        return Path(path)
    try:
        return Path(huggingface_hub.snapshot_download(str(path), revision=revision))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"path={str(path)!r}: neither a folder nor a reachable hub name ({reason})") from error
