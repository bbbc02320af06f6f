"""Turn a trained dense Transformer into a Mixture-of-Experts with less compute per token.

The names of this package, in ``__init__.pyi``, are imported when they are first used. Importing it also lets
``AutoModelFor...`` and pipelines of Hugging Face transformers load converted models.
"""

from importlib import metadata

import lazy_loader

from d2dmoe_pl.auto_classes import register_when_imported

_lazily, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
register_when_imported()


def __getattr__(name: str) -> object:
    return metadata.version(__name__) if name == "__version__" else _lazily(name)
