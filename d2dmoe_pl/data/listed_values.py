"""Values that are lists, and texts that stand for them."""

import ast
import json
import re
from typing import Any

from d2dmoe_pl.errors import ConfigError

UNPARTED = re.compile(r"""['"]\s+['"]""")  # as NumPy writes texts, which Python would read as a single one


def listed(value: Any, separator: str | None, where: str) -> list[Any]:
    """The parts of a list, or of a text: what Python or JSON wrote of a list, or one in which ``separator`` parts them.

    Args:
        value: The list or text; None for an empty one.
        separator: As ``str.split`` takes it.
        where: The column and sample, for errors.

    Raises:
        ConfigError: For a text in brackets that is no list, as NumPy writes them.

    Example:
        >>> from d2dmoe_pl.data.listed_values import listed
        >>> [listed(value, ",", "") for value in ("joy,fear", "['joy', 'fear']", ["joy"], None)]
        [['joy', 'fear'], ['joy', 'fear'], ['joy'], []]
    """
    if not isinstance(value, str):
        return list(value or [])
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return text.split(separator)
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, list) and not UNPARTED.search(text):
            return found
    raise ConfigError(
        f"{where} has {text[:60]!r}; must be a list as Python or JSON writes it, or its parts without brackets"
    )
