"""The two kinds of failure a user can mend; the command line prints them as one line, without a traceback."""


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, its value and what is allowed."""


class NonFiniteLossError(RuntimeError):
    """Training produced a NaN or infinite loss and was stopped before the weights were touched."""


def check(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)
