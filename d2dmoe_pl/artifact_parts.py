"""What an artifact says of its model, under our key in ``config.json``: which parts there are, and of which kind."""

from typing import Any

from d2dmoe_pl.adapters import KEY
from d2dmoe_pl.errors import check
from d2dmoe_pl.whole_files import is_file_name

PARTS = {
    "family": str,
    "layers": dict,
    "history": list,
    "tensors": list,
    "projections": dict,
    "quantized": list,
    "budgets": dict,
}
OPTIONAL = ("tensors", "projections", "quantized", "budgets")  # early artifacts had none, and others have none


def check_parts(made: Any, where: str) -> None:
    """Raise ``ConfigError`` unless an artifact's description has all of its parts, as they are written."""
    check(isinstance(made, dict), f"{where}: no artifact, the key {KEY!r} in config.json holds {type(made).__name__}")
    for part, kind in PARTS.items():
        is_there = part in made or part in OPTIONAL
        check(
            is_there and isinstance(made.get(part, kind()), kind),
            f"{where}: no artifact, {KEY}.{part} in config.json is missing or no {kind.__name__}",
        )
    for record in made["history"]:
        check(
            isinstance(record, dict) and "phase" in record and record.keys() <= {"phase", "metrics"},
            f"{where}: no artifact, {KEY}.history in config.json must hold records of phase and metrics",
        )
    check(bool(made["history"]), f"{where}: no artifact, {KEY}.history in config.json is empty")
    for name in made.get("tensors", []):
        check(
            is_file_name(name),
            f"{where}: no artifact, {KEY}.tensors in config.json names {name!r}, which is no file in the folder",
        )
