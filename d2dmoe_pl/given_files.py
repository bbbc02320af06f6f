"""What is in the files that a phase is made from, so that others in their place are told from them."""

import glob
import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

# settings whose values are files, folders or patterns, where there are such
SETTINGS = {
    "checkpoint_path",
    "dataset",
    "hash_list_file",
    "importance_file",
    "init_from",
    "model",
    "name",
    "processor",
    "teacher",
    "test",
    "tokenizer",
    "train",
    "validation",
}
FURTHER = ".more."  # before further splits, whose names are free
CONTENT = "content of "  # before a path, what keys of words begin with
BLOCK, LEAST = 1 << 16, 16  # bytes that are read at once, and how often at least of a file that is read in parts
MOST = 1 << 27  # bytes that are read of all files; larger ones are read in as many even parts
MOST_READ, MOST_SEEN = 500, 50_000  # files of a folder


def contents(config: Mapping[str, Any], output_dir: Path, phases: Collection[str] = ()) -> dict[str, str]:
    """What is in the files that a config names, in a word for each.

    Of more than 128 MiB only parts are read, evenly, and of more than 500 files only names and sizes.

    Args:
        config: Flat, from dotted settings to values.
        output_dir: Where phases leave their own, which are none of them.
        phases: The names of their folders there.

    Returns:
        From ``CONTENT`` and the path to the word.
    """

    @cache
    def known(path: str) -> str | None:
        return content(path, output_dir, phases)

    found = {}
    for setting, value in config.items():
        if setting.rpartition(".")[2] in SETTINGS or FURTHER in setting:
            for path in value if isinstance(value, list) else [value]:
                word = known(path) if isinstance(path, str) and path else None
                if word is not None:
                    found[f"{CONTENT}{path}"] = word
    return found


def content(path: str, besides: Path | None = None, phases: Collection[str] = ()) -> str | None:
    """A word for what is in the file, the folder, or the files of a pattern; None where there are none.

    Args:
        path: Of them.
        besides: The output folder of a chain, if any, which counts neither itself nor as a part of a folder.
        phases: Folders in it, whose files do not count either.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from d2dmoe_pl.given_files import content
        >>> file = Path(tempfile.mkdtemp()) / "train.csv"
        >>> _ = file.write_text("text,label")
        >>> before = content(str(file))
        >>> _ = file.write_text("text;label")
        >>> content(str(file)) == before
        False
        >>> content("nowhere") is None
        True
    """
    try:
        files = sorted(_files(path, None if besides is None else besides.resolve(), phases))
        described = [file.stat() for file in files]
        share = min(1.0, MOST / max(1, sum(each.st_size for each in described)))
        said = hashlib.blake2b(digest_size=6)
        for file, each in zip(files, described, strict=True):
            said.update(f"{os.path.relpath(file, path)} {each.st_size}\n".encode())
            if len(files) <= MOST_READ:
                blocks = max(LEAST, math.ceil(share * each.st_size / BLOCK))
                is_small = each.st_size <= BLOCK * LEAST
                said.update(
                    file.read_bytes() if is_small else _word(file, each.st_size, blocks, each.st_mtime_ns, each.st_ino)
                )
    except OSError:  # for what reads them to say
        return None
    return said.hexdigest() if files else None


def _files(path: str, besides: Path | None, phases: Collection[str]) -> Iterator[Path]:
    left = [] if besides is None else [besides / name for name in phases]
    for place in [path] if os.path.exists(path) else glob.glob(path, recursive=True):
        resolved = Path(place).resolve()
        if resolved == besides or any(resolved.is_relative_to(folder) for folder in left):
            continue
        if os.path.isfile(place):
            yield Path(place)
        seen = 0
        walked = {resolved}  # links may lead round in a ring
        for folder, folders, names in os.walk(place, followlinks=True):
            inside = {each: Path(folder, each).resolve() for each in sorted(folders) if each[0] != "."}
            folders[:] = [each for each, real in inside.items() if real != besides and real not in walked]
            walked.update(inside[each] for each in folders)
            for name in sorted(names):
                seen += 1
                if seen > MOST_SEEN:
                    return
                if name[0] != ".":
                    yield Path(folder, name)


@lru_cache(maxsize=1000)
def _word(file: Path, size: int, blocks: int, *changed: int) -> bytes:
    """What is in a file, or in so many blocks of it; read once a process, unless something has ``changed`` it."""
    said = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        for index in range(blocks):
            if size > BLOCK * blocks:
                opened.seek((size - BLOCK) * index // (blocks - 1))
            said.update(opened.read(BLOCK))
    return said.digest()
