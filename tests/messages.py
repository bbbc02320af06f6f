"""What the package says: the texts in its source, with … where values stand."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "d2dmoe_pl"
ANY = "…"
REFUSALS = {"ConfigError", "NonFiniteLossError", "OSError", "SettingTypeError", "ValueError", "check"}
WARNINGS = {"warn_once", "notice", "rank_zero_info", "warn", "warning"}


def template(node: ast.AST) -> str | None:
    """The text that an expression gives, as far as it is known; None for an expression that is no text."""
    if isinstance(node, ast.Constant):
        return node.value.replace("%s", ANY) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or ANY for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(side) for side in (node.left, node.right)]
        return None if parts == [None, None] else "".join(part or ANY for part in parts)
    return None


@cache
def _trees() -> list[ast.Module]:
    return [ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))]


@cache
def texts() -> set[str]:
    """Every text in the package but for docstrings."""
    found: set[str] = set()
    for tree in _trees():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {template(node) or "" for node in ast.walk(tree) if id(node) not in docstrings}
    return found - {""}


def messages() -> set[str]:
    """What the package refuses and warns with, but for messages that are put together elsewhere."""
    found: set[str] = set()
    for tree in _trees():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            is_yellow = any(isinstance(each, ast.Constant) and each.value == "yellow" for each in given)
            said = call.args[1:] if name == "check" else call.args
            if said and (name in REFUSALS | WARNINGS or is_yellow):
                found.add(template(said[0]) or "")
    return {message for message in found if sum(letter.isalpha() for letter in message) > 6}
