"""What comes from a folder or the hub: tokenizers, image processors, models and their configurations."""

from typing import Any

from d2dmoe_pl.errors import ConfigError


def load_pretrained(kind: Any, name: str, argument: str, **kwargs: Any) -> Any:
    """What ``kind.from_pretrained(name, **kwargs)`` gives.

    Args:
        kind: One of the ``Auto`` classes of transformers.
        name: Hub name or folder.
        argument: What the user calls this setting, for the error.
        kwargs: As ``from_pretrained`` takes them.

    Raises:
        ConfigError: If it is neither in a folder of that name nor on the hub, the hub cannot be reached, or
            transformers does not know its type.
    """
    reason: str
    cause: Exception
    try:
        return kind.from_pretrained(name, **kwargs)
    except OSError as error:
        reason, cause = "neither a folder nor a reachable hub name", error
    except ValueError as error:  # e.g. a type of model that transformers does not know
        reason, cause = "not what transformers can make", error
    raise ConfigError(f"{argument}={name!r}: {reason} ({str(cause).strip().splitlines()[0]})") from cause
