"""What jsonargparse says of a setting that it does not take, as one line."""

import difflib
import re
from collections.abc import Collection
from inspect import isclass, signature
from pkgutil import resolve_name
from typing import Any

from lightning import Trainer

from d2dmoe_pl.errors import one_line

# of a class that is named in the settings: which, and what is wrong with it
OF_CLASS = re.compile(
    r"Problem with given class_path '(?P<given>[^']+)':\s+(?P<why>\S.*)"
    r"|Expected a dot import path string: (?P<unknown>\S+)"
    r"|expects a function or a callable class: (?P<reason>.*)\. Got value: Namespace\(class_path='(?P<made>[^']+)'"
)

# a setting of no class that is named in the settings
UNKNOWN = (
    re.compile(r"unrecognized arguments: (?P<option>.*)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>.*)'"),
    re.compile(r"Subcommand '\w+' does not accept option '(?P<option>.*)'"),
    re.compile(r"\AOption '(?P<option>.*)' is not accepted"),
)
CLASS_AND_SETTINGS = "must be a class that fits, by its class_path, with its settings under init_args"
SETTINGS = (
    "model",
    "data",
    "trainer",
    "seed_everything",
    *(f"trainer.{name}" for name in signature(Trainer).parameters),
)


def parser_line(text: str) -> str:
    """What jsonargparse says of a setting, as ``key=value: what is allowed``.

    Example:
        >>> from d2dmoe_pl.parser_line import parser_line
        >>> parser_line('Parser key "seed":' + chr(10) + "  Expected a <class 'int'>. Got value: x")
        "seed='x': must be int"
    """
    unknown = next((found for found in (pattern.search(text) for pattern in UNKNOWN) if found), None)
    if unknown:
        option = ".".join(filter(None, (unknown.groupdict().get("group"), one_line(unknown["option"]))))
        close = meant(re.split(r"[= ]", option.lstrip("-"))[0], SETTINGS)
        return f"{option}: no such setting{close or '; --help lists them, and --model.help=CLASS those of a class'}"
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
        type_name(found) for found in re.findall(r"Expected an? (.*?)\.?(?: Got value.*)?$", rest, re.MULTILINE)
    ]
    kinds = [kind for kind in dict.fromkeys(expected) if kind]
    if kinds and kinds != ["null"]:
        return f"{name}: must be {' or '.join(kinds)}"
    return f"{name}: {one_line(_last_reason(rest) or rest)}"


def _of_class(text: str) -> str:
    """What is wrong with the innermost class that ``text`` names, in words; empty if nothing is that has some here."""
    bases = _bases(text)
    for found in reversed(list(OF_CLASS.finditer(text))):
        path = found["given"] or found["unknown"] or found["made"]
        name, why = path.rpartition(".")[2], found["why"] or found["reason"] or ""
        if why.startswith("Parser key"):
            return ""  # of a setting inside, which is told by itself
        option = re.fullmatch(r"Option '(.*)' is not accepted", why)
        if option and (option[1] == "class_path" or resolve_name(path) in bases):
            return CLASS_AND_SETTINGS
        if option:
            return f"{name} has no setting {option[1]!r}{meant(option[1], signature(resolve_name(path)).parameters)}"
        lacking = re.fullmatch(r"the following arguments are required: (.*)", why)
        if lacking:
            return f"{name} must be given {lacking[1]}, and is not"
        if found["unknown"] and re.search(r"Expected a <class '(int|float|str)'>", text):
            continue  # it need not have been meant as a class
        if found["unknown"] or "No module named" in why or "has no attribute" in why:
            reason = f" ({one_line(why)})" if why else ""
            close = meant(name, {each.__name__ for base in bases for each in _below(base)})
            others = "" if close or "." in path else "; others than this package's go by their path (torch.optim.AdamW)"
            return f"class_path={path!r}: no such class{reason}{close}{others}"
    given = text.rpartition("Given value: ")[2]
    return CLASS_AND_SETTINGS if "Not a valid subclass of" in text or given.startswith("{'class_path'") else ""


def _bases(text: str) -> list[type[Any]]:
    """The classes of which a setting takes an object, by the types that ``text`` lists."""
    kinds = re.findall(r"Subtypes: \[(.*)\]|Type (\S+\[.*\]) expects a function", text)
    names = re.findall(r"(?:\w+\.)+[A-Z]\w+", " ".join(map("".join, kinds)))
    return [kind for kind in map(resolve_name, names) if isclass(kind)]


def _below(kind: type[Any]) -> list[type[Any]]:
    """A class and those that have been imported and inherit from it."""
    return [kind, *(each for below in kind.__subclasses__() for each in _below(below))]


def meant(name: str, known: Collection[str]) -> str:
    """What may have been meant by ``name``, to put behind what is said of it; its first part or its last differs.

    Example:
        >>> from d2dmoe_pl.parser_line import meant
        >>> meant("trainer.max_epoch", ["trainer", "trainer.max_epochs"])
        '; did you mean trainer.max_epochs?'
    """
    first, (group, _, last) = name.partition(".")[0], name.rpartition(".")
    if group and first not in known:
        return meant(first, known)
    beside = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == group}
    close = difflib.get_close_matches(last, [each for each in beside if each[0] != "_"])
    return f"; did you mean {' or '.join(beside[each] for each in close)}?" if close else ""


def _last_reason(text: str) -> str:
    """Of several reasons, that which is not merely a type that the value has not."""
    reasons = [
        line.strip().removeprefix("- ")
        for line in text.splitlines()
        if line.strip()
        and not re.match(r"\s*(- Expected a <class|Given value|Subtypes|Errors|Does not validate)", line)
    ]
    return reasons[-1].split(" Got value:")[0] if reasons else ""


def type_name(expected: str) -> str:
    """How a user writes values of a type that jsonargparse expects; empty where it is more than a word."""
    known = re.fullmatch(r"<class '([\w.]+)'>", expected)
    if known:
        return {"NoneType": "null", "bool": "true or false"}.get(known[1], known[1])
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", expected)
    return literal[1].replace("'", "") if literal else ""
