"""Folders that are there, or that the Hugging Face hub has."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub

from d2dmoe_pl.errors import ConfigError, one_line

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(path: str | Path, revision: str | None = None, argument: str = "path", **kwargs: Any) -> Path:
    """The folder ``path``, downloaded first if that is no folder but the name of a model on the hub.

    Args:
        path: A folder, or a name such as ``organisation/name``.
        revision: Of a model on the hub: a branch, a tag or a commit.
        argument: What the user calls the path, for the error.
        kwargs: As ``snapshot_download`` takes them, such as ``token`` and ``cache_dir``.

    Raises:
        ConfigError: If the hub does not have it or cannot be reached.
    """
    if Path(path).is_dir() or not HUB_NAME.fullmatch(str(path)):
        return Path(path)
    try:
        return Path(huggingface_hub.snapshot_download(str(path), revision=revision, **kwargs))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        said = f"{argument}={str(path)!r}" + ("" if revision is None else f", revision={revision!r}")
        raise ConfigError(f"{said}: neither a folder nor a reachable hub name ({one_line(str(error))})") from error
