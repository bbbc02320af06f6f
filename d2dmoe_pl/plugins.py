"""Plug-ins found by name: files of a folder, entry points of installed packages, and what was registered in code."""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from d2dmoe_pl.errors import ConfigError, check

T = TypeVar("T")


class Plugins(Generic[T]):
    """All plug-ins of one kind, by name.

    Each module of ``package`` whose name does not begin with ``_`` holds one plug-in, under the module's own name.
    Another installed package adds some by entry points of the group :attr:`group`, whose values look like
    ``its_module:its_object``. Modules and entry points are imported when a plug-in is asked for, and no earlier.

    Args:
        package: Dotted name of the folder, which is also where its docstring says what a plug-in has to do.
        constant: What every module of the folder calls its plug-in.
        kind: What a plug-in is, in words, for errors.
        fits: Whether an object is such a plug-in.

    Example:
        >>> from d2dmoe_pl.moe.gating import GATING_RULES
        >>> GATING_RULES.names()
        ['dynk_cumulative', 'dynk_max', 'topk']
    """

    def __init__(self, package: str, constant: str, kind: str, fits: Callable[[Any], bool]) -> None:
        self.package = package
        self.constant = constant
        self.kind = kind
        self.fits = fits
        self._registered: dict[str, T] = {}

    @property
    def group(self) -> str:
        """Group of entry points: ``d2dmoe_pl.`` and the last part of the folder's name."""
        return f"d2dmoe_pl.{self.package.rpartition('.')[2]}"

    def names(self) -> list[str]:
        """The names of all plug-ins, sorted."""
        return sorted({*_modules(self.package), *_entry_points(self.group), *self._registered})

    def register(self, name: str, plugin: T) -> None:
        """Add ``plugin`` under ``name``, for this process.

        Raises:
            ConfigError: If the name is no text, or taken by another plug-in, or ``plugin`` is none of this kind.
        """
        check(isinstance(name, str) and name != "", f"name={name!r}: must be a text, by which {self.group} is found")
        taken = name in self.names() and self._registered.get(name) is not plugin
        check(not taken, f"{name!r}: is the name of one of {self.group} already; taken are {', '.join(self.names())}")
        self._registered[name] = self._checked(name, plugin, "was registered")

    def find(self, name: str, argument: str) -> T:
        """The plug-in called ``name``.

        Args:
            name: Its name.
            argument: What the user calls this setting, for the error.

        Raises:
            ConfigError: If there is none of that name, two packages bring one, or what they bring is none, or cannot
                be imported.
        """
        if not isinstance(name, str) or name not in self.names():
            raise ConfigError(f"{argument}={name!r}: allowed are {', '.join(self.names())}")
        if name in self._registered:
            return self._registered[name]
        entries = _entry_points(self.group).get(name, [])
        if name in _modules(self.package):
            brought = [f"entry point {entry.value}" for entry in entries]
            check(not entries, f"{argument}={name!r}: is in {self.package}, and also {', '.join(brought)}")
            module = importlib.import_module(f"{self.package}.{name}")
            constant = f"{argument}={name!r}: {module.__file__} must name what is looked for there {self.constant}"
            check(hasattr(module, self.constant), constant)
            return self._checked(name, getattr(module, self.constant), f"is in {module.__file__}")
        values = [entry.value for entry in entries]
        check(len(entries) == 1, f"{argument}={name!r}: is more than one entry point: {', '.join(values)}")
        try:
            plugin = entries[0].load()
        except Exception as error:  # whatever somebody's module raises
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{argument}={name!r}: the entry point {values[0]} cannot be loaded ({reason})"
            ) from error
        return self._checked(name, plugin, f"is the entry point {values[0]}")

    def is_own(self, name: str) -> bool:
        """Whether ``name`` is a file of the folder, and not from outside."""
        return name in _modules(self.package)

    def is_imported(self, name: str) -> bool:
        """Whether the file ``name`` of the folder has been imported."""
        return f"{self.package}.{name}" in sys.modules

    def _checked(self, name: str, plugin: Any, origin: str) -> T:
        check(self.fits(plugin), f"{name!r} of {self.group}: {origin} as {plugin!r}; must be {self.kind}")
        return cast(T, plugin)


@functools.cache
def _modules(package: str) -> frozenset[str]:
    folder = importlib.import_module(package)
    return frozenset(module.name for module in pkgutil.iter_modules(folder.__path__) if module.name[0] != "_")


@functools.cache
def _entry_points(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return found
