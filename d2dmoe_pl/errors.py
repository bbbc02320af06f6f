"""The kinds of failure that the command line prints as one line, without a traceback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONGEST = 400  # characters of a reason that another library gives


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, its value and what is allowed."""


class SettingTypeError(ConfigError, TypeError):
    """A setting that was made in Python, or is written in an artifact, of another type than it is said to be."""


class NonFiniteLossError(RuntimeError):
    """Training produced a NaN or infinite loss and was stopped before the weights were touched."""


class NonFiniteWeightsError(RuntimeError):
    """Weights became NaN or infinite, and were kept neither in a checkpoint nor in an artifact."""


class InterruptedPhaseError(RuntimeError):
    """A phase of a chain broke off, by the error that is its cause; the same command goes on from there.

    Attributes:
        folder: The phase's.
    """

    def __init__(self, phase: str, folder: Path) -> None:
        super().__init__(f"{phase} broke off")
        self.phase = phase
        self.folder = folder


def check(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def check_kind(value: object, kind: type, argument: str = "config") -> None:
    """Raise :class:`SettingTypeError` unless ``value``, which is given as ``argument``, is a ``kind``."""
    if not isinstance(value, kind):
        raise SettingTypeError(f"{argument}: is {said_of(value)}; must be of the class {kind.__name__}")


def one_line(text: str) -> str:
    """A text without its line ends, cut where it is long."""
    joined = " ".join(text.split())
    return joined if len(joined) <= LONGEST else joined[: LONGEST - 1] + "…"


def some_of(names: Sequence[str], at_most: int = 20) -> str:
    """Names with commas between them, and how many there are more than are said.

    Example:
        >>> from d2dmoe_pl.errors import some_of
        >>> some_of(["anger", "fear", "joy"]), some_of(["anger", "fear", "joy"], at_most=1)
        ('anger, fear, joy', 'anger and 2 more')
    """
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def said_of(value: Any) -> str:
    """What is said in a message of a value that is to be a tensor, and perhaps is none.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.errors import said_of
        >>> said_of(torch.zeros(3, 1)), said_of(None)
        ('torch.float32 of shape (3, 1) on cpu', 'NoneType')
    """
    if hasattr(value, "shape") and hasattr(value, "device"):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__
