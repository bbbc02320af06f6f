"""What jsonargparse says of a setting that it does not take, as one line."""

import difflib
import inspect
import re
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

from d2dmoe_pl.errors import one_line

# of a class that is named in the settings: which, and what is wrong with it
OF_CLASS = re.compile(
    r"Problem with given class_path '(?P<given>[^']+)':\s+(?P<why>\S.*)"
    r"|Expected a dot import path string: (?P<unknown>\S+)"
    r"|expects a function or a callable class: (?P<reason>.*)\. Got value: Namespace\(class_path='(?P<made>[^']+)'"
)


def parser_line(text: str) -> str:
    """What jsonargparse says of a setting, as ``key=value: what is allowed``.

    Example:
        >>> from d2dmoe_pl.parser_line import parser_line
        >>> parser_line('Parser key "seed":' + chr(10) + "  Expected a <class 'int'>. Got value: x")
        "seed='x': must be int"
    """
    unknown = re.findall(r"unrecognized arguments: (.*)", text)
    if unknown:
        return f"{one_line(unknown[-1])}: no such setting; --help lists them, and --model.help=CLASS those of a class"
    missing = re.findall(r'Key "([^"]+)" is required', text)
    if missing:
        return f"{missing[-1]}: must be given, and is not"
    keys = list(re.finditer(r'Parser key "([^"]+)":?', text))
    if not keys:
        return one_line(text)
    of_class = _of_class(text)
    if of_class:
        return f"{keys[-1][1]}: {of_class}"
    rest = text[keys[-1].end() :]
    first = rest.strip().split("\n")[0]
    if "Got value:" in first:  # below, what encloses the setting says that it is not null either
        rest = first
    given = re.search(r"(?:Got value|Given value): (.*)", rest)
    key, value = keys[-1][1], given[1].strip() if given else ""
    nested = re.match(r"NestedArg\(key='([^']*)', val=(.*)\)$", value)
    if nested:
        key, value = f"{key}.{nested[1]}", nested[2].strip("'\"")
    name = f"{key}={value!r}" if 0 < len(value) < 80 else key
    expected = [
        _type_name(found) for found in re.findall(r"Expected an? (.*?)\.?(?: Got value.*)?$", rest, re.MULTILINE)
    ]
    kinds = [kind for kind in dict.fromkeys(expected) if kind]
    if kinds and kinds != ["null"]:
        return f"{name}: must be {' or '.join(kinds)}"
    return f"{name}: {one_line(_last_reason(rest) or rest)}"


def _of_class(text: str) -> str:
    """What is wrong with the innermost class that ``text`` names, in words; empty if nothing is that has some here."""
    for found in reversed(list(OF_CLASS.finditer(text))):
        path = found["given"] or found["unknown"] or found["made"]
        why = found["why"] or found["reason"] or ""
        option = re.fullmatch(r"Option '(.*)' is not accepted", why)
        if option and option[1] == "class_path":  # the parser takes the whole for the arguments of a class
            return "has settings beside a class_path; those of a class must stand under init_args"
        if option:
            taken = inspect.signature(resolve_name(path)).parameters
            return f"{path.rpartition('.')[2]} has no setting {option[1]!r}{_meant(option[1], taken)}"
        lacking = re.fullmatch(r"the following arguments are required: (.*)", why)
        if lacking:
            return f"{path.rpartition('.')[2]} must be given {lacking[1]}, and is not"
        if found["unknown"] and re.search(r"Expected a <class '(int|float|str)'>", text):
            continue  # it need not have been meant as a class
        if found["unknown"] or "No module named" in why or "has no attribute" in why:
            reason = f" ({one_line(why)})" if why else ""
            meant = _meant(path.rpartition(".")[2], _allowed(text))
            elsewhere = (
                "" if meant or "." in path else "; others than this package's go by their path (torch.optim.AdamW)"
            )
            return f"class_path={path!r}: no such class{reason}{meant}{elsewhere}"
    return ""


def _allowed(text: str) -> set[str]:
    """The names of the classes that have been imported and that a setting takes, by the types that ``text`` lists."""
    kinds = re.findall(r"Subtypes: \[(.*)\]|Type (\S+\[.*\]) expects a function", text)
    names = re.findall(r"(?:\w+\.)+[A-Z]\w+", " ".join(map("".join, kinds)))
    found: set[str] = set()
    for name in names:
        kind: Any = resolve_name(name)
        waiting = [kind] if inspect.isclass(kind) else []
        while waiting:
            kind = waiting.pop()
            found.add(kind.__name__)
            waiting += kind.__subclasses__()
    return found


def _meant(name: str, known: Iterable[str]) -> str:
    """What may have been meant by ``name``, to put behind what is said of it."""
    close = difflib.get_close_matches(name, [each for each in known if each[0] != "_"], n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _last_reason(text: str) -> str:
    """Of several reasons, that which is not merely a type that the value has not."""
    reasons = [
        line.strip().removeprefix("- ")
        for line in text.splitlines()
        if line.strip()
        and not re.match(r"\s*(- Expected a <class|Given value|Subtypes|Errors|Does not validate)", line)
    ]
    return reasons[-1].split(" Got value:")[0] if reasons else ""


def _type_name(expected: str) -> str:
    """How a user writes values of a type that jsonargparse expects; empty where it is more than a word."""
    known = re.fullmatch(r"<class '([\w.]+)'>", expected)
    if known:
        return {"NoneType": "null", "bool": "true or false"}.get(known[1], known[1])
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", expected)
    return literal[1].replace("'", "") if literal else ""
