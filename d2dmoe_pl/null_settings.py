"""Settings that are null where the class that is made of them takes none."""

from collections.abc import Callable, Iterator
from inspect import signature
from pkgutil import resolve_name
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import Namespace

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.parser_line import type_name


def check_nulls(name: str, kind: Callable[..., Any], settings: Namespace) -> None:
    """Raise ``ConfigError`` for a setting that is null and has a type that has no null, in others as well.

    A parser takes null for anything; what is made of it then fails where it is used.

    Args:
        name: What the settings are called together, e.g. ``trainer``.
        kind: The class that is made of them.
        settings: By name.

    Example:
        >>> from jsonargparse import Namespace
        >>> from d2dmoe_pl.null_settings import check_nulls
        >>> from d2dmoe_pl.data import Digits
        >>> check_nulls("data", Digits, Namespace(batch_size=None))
        Traceback (most recent call last):
        d2dmoe_pl.errors.ConfigError: data.batch_size=null: must be int
    """
    for key, value in vars(settings).items():
        hint = _hint(kind, key)
        if value is None and hint is not None and NoneType not in (hint, *get_args(hint)):
            word = type_name(str(hint))
            raise ConfigError(f"{name}.{key}=null: must be {word or 'left out, for what it is by default'}")
        for below, each in _settings_in(f"{name}.{key}", value):
            if "class_path" in each:
                check_nulls(f"{below}.init_args", resolve_name(each.class_path), each.get("init_args") or Namespace())
            elif isinstance(hint, type):  # a dataclass
                check_nulls(below, hint, each)


def _settings_in(name: str, value: Any) -> Iterator[tuple[str, Namespace]]:
    """What of a setting is settings itself, by its name."""
    if isinstance(value, Namespace):
        yield name, value
    elif isinstance(value, list):
        for position, each in enumerate(value):
            yield from _settings_in(f"{name}[{position}]", each)


def _hint(kind: Any, name: str) -> Any:
    """The type of an argument of a class or function; None where that takes anything, or nothing is said."""
    for each in getattr(kind, "__mro__", (kind,)):
        made_by = vars(each).get("__init__") if isinstance(each, type) else each
        if made_by is None or name not in signature(made_by).parameters:
            continue
        if signature(made_by).parameters[name].default is None:
            return None
        try:
            found = get_type_hints(made_by).get(name)
        except (NameError, TypeError):  # of names that are there for type checkers only
            return None
        return None if found in (Any, object) or isinstance(found, TypeVar) else found
    return None
