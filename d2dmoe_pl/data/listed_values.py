"""Values that are lists or the like, and texts that stand for them."""

import ast
import json
import re
from typing import Any

from d2dmoe_pl.errors import check

# a tuple or a set of texts as Python writes it, unless what is in the brackets is none
TUPLE_OR_SET = re.compile(r"""\(\s*\)|set\(\)|\(\s*['"].*\)|\{\s*['"].*\}""", re.DOTALL)
UNPARTED = re.compile(r"""['"]\s+['"]""")  # as NumPy writes texts, which Python would read as a single one


def listed(value: Any, separator: str | None, where: str) -> list[Any]:
    """The parts of a list, or of a text: what Python or JSON wrote of a list, or one in which ``separator`` parts them.

    Args:
        value: The list or text, also of a tuple or a set; None or an empty text for an empty one.
        separator: As ``str.split`` takes it.
        where: The column and sample, for errors.

    Raises:
        ConfigError: For a text in brackets that is no list, as NumPy writes them, nor a tuple or a set of texts.

    Example:
        >>> from d2dmoe_pl.data.listed_values import listed
        >>> [listed(value, ",", "") for value in ("joy,fear", "['joy', 'fear']", "{'joy'}", ["joy"], None, "")]
        [['joy', 'fear'], ['joy', 'fear'], ['joy'], ['joy'], [], []]
    """
    if not isinstance(value, str):
        return list(value or [])
    text = value.strip()
    if not text:
        return []
    if not (text.startswith("[") and text.endswith("]")) and TUPLE_OR_SET.fullmatch(text) is None:
        return text.split(separator)
    found = written(text)
    check(
        isinstance(found, list | tuple | set) and not UNPARTED.search(text),
        f"{where} has {text[:60]!r}; must be a list as Python or JSON writes it, or its parts without brackets",
    )
    assert isinstance(found, list | tuple | set)
    return sorted(found, key=str) if isinstance(found, set) else list(found)


def written(text: str) -> Any:
    """The value that JSON or Python wrote as ``text``, with lists for the arrays in it; None if there is none.

    Example:
        >>> from d2dmoe_pl.data.listed_values import written
        >>> written("{'text': array(['a'], dtype=object)}"), written('{"text": ["a"]}'), written("a]")
        ({'text': ['a']}, {'text': ['a']}, None)
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(_ArraysAsLists().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError):
        return None


class _ArraysAsLists(ast.NodeTransformer):
    """NumPy's arrays inside of something are written with what makes them: ``array([1, 2])``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_array = isinstance(node.func, ast.Name) and node.func.id == "array" and bool(node.args)
        return self.visit(node.args[0]) if is_array else node
