"""Turn a trained dense Transformer into a Mixture-of-Experts with less compute per token.

The names of this package, in ``__init__.pyi``, are imported when they are first used.
"""

from importlib import metadata

import lazy_loader

_lazily, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    return metadata.version(__name__) if name == "__version__" else _lazily(name)
