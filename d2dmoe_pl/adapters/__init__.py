"""One file a model family. A file that defines ``ADAPTER`` is found by itself: adding a family is adding a file."""

import importlib
import pkgutil

from torch import nn

from d2dmoe_pl.adapters.attention import Projection
from d2dmoe_pl.adapters.base import Adapter, ModelSource
from d2dmoe_pl.adapters.ffn import FFN
from d2dmoe_pl.adapters.hugging_face_model import HuggingFaceModel
from d2dmoe_pl.adapters.timm_vit import TimmModel
from d2dmoe_pl.errors import ConfigError

__all__ = [
    "ADAPTERS",
    "FFN",
    "Adapter",
    "HuggingFaceModel",
    "ModelSource",
    "Projection",
    "TimmModel",
    "adapter_for",
    "adapter_named",
]

_modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
_adapters = [module.ADAPTER for module in _modules if hasattr(module, "ADAPTER")]
ADAPTERS: dict[str, Adapter] = {adapter.family: adapter for adapter in _adapters}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the model's family.

    Raises:
        ConfigError: If there is none.
    """
    for adapter in ADAPTERS.values():
        if adapter.matches(model):
            return adapter
    raise ConfigError(
        f"{type(model).__name__}: no adapter knows this model; known families are {', '.join(ADAPTERS)} "
        "(to add one, write a file in d2dmoe_pl/adapters that defines ADAPTER)"
    )


def adapter_named(family: str) -> Adapter:
    """The adapter of ``family``, as an artifact records it.

    Raises:
        ConfigError: If there is none.
    """
    if family not in ADAPTERS:
        raise ConfigError(f"family={family!r}: allowed are {', '.join(ADAPTERS)}")
    return ADAPTERS[family]
