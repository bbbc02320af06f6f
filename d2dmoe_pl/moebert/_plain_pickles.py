"""Pickles of numbers: lists, dicts, tuples, strings, and what NumPy writes of numbers; nothing in them can run."""

import io
import pickle
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from d2dmoe_pl.errors import ConfigError

# kinds and sizes of numbers; no objects, no text
NUMBERS = {
    f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248", "b": "1"}.items() for size in sizes
}


class PlainUnpickler(pickle.Unpickler):
    """Admits what needs no import, and NumPy's scalars and arrays of numbers, which are made here, not by NumPy.

    Args:
        file: The pickle.
        where: What the user calls it, for the error.
    """

    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self._where = where

    def find_class(self, module: str, name: str) -> "_Maker":
        # NumPy 1 calls its core by another name than NumPy 2
        make = MAKERS.get((module.replace("numpy.core.", "numpy._core."), name))
        if make is None:
            raise ConfigError(
                f"{self._where}: the pickle asks for {module}.{name}; allowed are plain lists, dicts, tuples, numbers "
                "and strings, and NumPy's numbers and arrays of them"
            )
        return _Maker(make)


def plain(value: Any) -> Any:
    """A value from such a pickle, with lists in the place of arrays."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value


class _Maker:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError


class _Kind:
    """What NumPy calls a dtype: a kind of numbers, and the order of their bytes."""

    __slots__ = ("_order", "_spec")

    def __init__(self, spec: str, *_: Any) -> None:
        if spec not in NUMBERS:
            raise pickle.UnpicklingError(f"an array of {spec}")
        self._spec = spec
        self._order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: tuple) -> None:
        self._order = state[1] if state[1] in ("<", ">", "=") else "="

    def numbers(self, content: bytes) -> np.ndarray:
        """The numbers in ``content``, one after another."""
        return np.frombuffer(content, dtype=np.dtype(self._spec).newbyteorder(self._order))


class _Array:
    """What NumPy calls an array, as nested lists."""

    __slots__ = ("values",)

    def __init__(self, *_: Any) -> None:
        self.values: Any = []

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        self.values = kind.numbers(content).reshape(shape, order="F" if is_fortran else "C").tolist()


def _scalar(kind: _Kind, content: bytes) -> int | float | bool:
    (number,) = kind.numbers(content).tolist()
    return number


def _from_buffer(content: Any, kind: _Kind, shape: tuple, order: str) -> _Array:
    made = _Array()
    made.__setstate__((1, shape, kind, order == "F", bytes(content)))
    return made


def _encoded(text: str, encoding: str) -> bytes:
    """How bytes stand in a pickle of an old protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encoded,
}
