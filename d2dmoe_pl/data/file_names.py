"""What names of files say of what is in them."""

from collections.abc import Sequence
from pathlib import Path

from d2dmoe_pl.errors import check

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def ending_of(path: str) -> str:
    """The last ending of ``path`` that is not a compression's; empty if there is none."""
    endings = [ending for ending in Path(path).suffixes if ending not in COMPRESSIONS]
    return endings[-1] if endings else ""


def check_not_twice(argument: str, files: Sequence[str]) -> None:
    """Raise ``ConfigError`` if a file is there compressed as well: its rows would count twice, and be in two splits."""
    found: dict[str, str] = {}
    for file in files:
        plain = file
        while Path(plain).suffix in COMPRESSIONS:
            plain = str(Path(plain).with_suffix(""))
        other = found.setdefault(plain, file)
        check(other is file, f"{argument}: {other} and {file} are one file, compressed and not; remove one of them")
