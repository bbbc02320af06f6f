"""LightningDataModules that give dict batches and a task. One config serves every phase; no knowledge of models.

The names of this package, in ``__init__.pyi``, are imported when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
