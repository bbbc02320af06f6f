"""One file a model family, whose ``ADAPTER`` is an instance of an :class:`Adapter`: adding a family is adding a file.

Families are imported when a model of theirs is met; the names of this package, in ``__init__.pyi``, likewise.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
