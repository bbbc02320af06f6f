"""Settings that are made in Python are of the types that they are said to be, as those of a command line are."""

import operator
import os
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from d2dmoe_pl.errors import SettingTypeError

OTHER = object()  # stands for a value of another type
SEQUENCES = (list, tuple)
UNIONS = (Union, UnionType)


def check_types_(settings: Any) -> None:
    """Check every field of a dataclass against its annotation.

    What NumPy and torch have numbers in become numbers of Python's, which files can hold, and paths become texts.

    Raises:
        SettingTypeError: For a value of another type; it names the field and the types that are allowed.

    Example:
        >>> from dataclasses import dataclass
        >>> from d2dmoe_pl.typed_settings import check_types_
        >>> @dataclass(frozen=True)
        ... class Config:
        ...     width: int | None = None
        ...
        ...     def __post_init__(self) -> None:
        ...         check_types_(self)
        >>> Config("8")
        Traceback (most recent call last):
        d2dmoe_pl.errors.SettingTypeError: width='8': has the type str; must be int or None
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        given, hint = getattr(settings, field.name), hints[field.name]
        plain = _as(given, hint)
        if plain is OTHER:
            has = type(given).__name__
            raise SettingTypeError(f"{field.name}={given!r}: has the type {has}; must be {_said(hint)}")
        if plain is not given:
            object.__setattr__(settings, field.name, plain)


def _as(value: Any, hint: Any) -> Any:
    """``value`` as one of a type, or ``OTHER`` if it is none; of a word from a list, its own check says the list."""
    if get_origin(hint) in UNIONS:
        found = (_as(value, each) for each in get_args(hint))
        return next((each for each in found if each is not OTHER), OTHER)
    if hint is NoneType:
        return value if value is None else OTHER
    if hint in (int, float):
        return _as_number(value, hint)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint in (bool, str):
        return value if isinstance(value, hint) else OTHER
    kind, inner = get_origin(hint), get_args(hint)
    if kind in SEQUENCES:
        return _all(value, [_as(each, inner[0]) for each in value]) if isinstance(value, SEQUENCES) else OTHER
    if kind is dict:
        parts = [_as(part, of) for pair in _pairs(value) for part, of in zip(pair, inner, strict=True)]
        return value if isinstance(value, Mapping) and not any(part is OTHER for part in parts) else OTHER
    if kind is Literal:
        return value if isinstance(value, str) else OTHER
    return value


def _as_number(value: Any, kind: type[Any]) -> Any:
    if type(value) is kind or (kind is float and type(value) is int):  # which is written as it was given
        return value
    if isinstance(value, bool | str | bytes):
        return OTHER
    try:
        return operator.index(value) if kind is int else float(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises the last, of more than one number
        return OTHER


def _all(value: Any, parts: list[Any]) -> Any:
    if any(part is OTHER for part in parts):
        return OTHER
    return value if all(map(operator.is_, value, parts)) else type(value)(parts)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _said(hint: Any) -> str:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in UNIONS:
        return " or ".join(map(_said, inner))
    if kind in SEQUENCES:
        return f"{kind.__name__} of {_said(inner[0])}"
    if kind is dict:
        return f"dict of {_said(inner[0])} to {_said(inner[1])}"
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    return "None" if hint is NoneType else str(getattr(hint, "__name__", hint))
