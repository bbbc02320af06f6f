"""Functions found by the name of their file: adding a gating rule, a split or a kernel is adding one file."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from d2dmoe_pl.errors import ConfigError


def names(package: ModuleType) -> list[str]:
    """The names of the modules in ``package``, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(package: ModuleType, name: str, argument: str) -> Callable:
    """The function ``name`` of the module ``name`` in ``package``.

    Args:
        package: The package to look in; every module in it holds a function of the module's own name.
        name: The function's name.
        argument: What the user calls this setting, for the error.

    Raises:
        ConfigError: If the package has no such module.
    """
    if name not in names(package):
        raise ConfigError(f"{argument}={name!r}: allowed are {', '.join(names(package))}")
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), name)
