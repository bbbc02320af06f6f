"""Converted models through the ``Auto`` classes and pipelines of Hugging Face transformers.

The ``config.json`` of a converted model has the ``model_type`` ``d2dmoe``, which transformers does not know by itself.
``import d2dmoe_pl`` makes it known, as soon as transformers' ``Auto`` classes are there; without it they refuse the
model, and without random weights in the place of experts.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pkgutil import resolve_name
from types import ModuleType

MODEL_TYPE = "d2dmoe"
AUTO = "transformers.models.auto.modeling_auto"


def register_when_imported() -> None:
    """Make converted models known to transformers' ``Auto`` classes now if these are imported, else once they are."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())


def register() -> None:
    """Make converted models known to transformers' ``Auto`` classes."""
    resolve_name("d2dmoe_pl.auto_models:register")()


class _AutoFinder(MetaPathFinder):
    """Calls :func:`register` once transformers' ``Auto`` classes have been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenCalls(spec.loader, register)
        return spec


class _ThenCalls(Loader):
    """A loader that calls a function when it has loaded a module."""

    def __init__(self, loader: Loader, function: Callable[[], None]) -> None:
        self._loader = loader
        self._function = function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._function()
