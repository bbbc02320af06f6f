"""Datasets that a function makes, once: the next time they come from the cache of Hugging Face ``datasets``."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from d2dmoe_pl.errors import ConfigError


def generated(make: Callable[..., Iterator[dict]], features: Features | None = None, **arguments: Any) -> Dataset:
    """The rows that ``make(**arguments)`` yields, made anew if its file or an argument changes.

    Args:
        make: A function of a module; takes ``code``, the text of its file, besides ``arguments``.
        features: Types of the columns; guessed if not given.
        arguments: What the rows depend on.

    Raises:
        ConfigError: As ``make`` does.
    """
    code = Path(make.__code__.co_filename).read_text()
    try:
        return Dataset.from_generator(make, features=features, gen_kwargs={**arguments, "code": code})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise
