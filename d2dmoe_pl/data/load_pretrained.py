"""What comes from a folder or the hub: tokenizers, image processors, models and their configurations."""

from typing import Any

from d2dmoe_pl.data.gguf_files import (
    ENDING,
    check_positions,
    check_readable,
    check_taken,
    dense_loading,
    folder_and_file,
    without_foreign_tokens,
)
from d2dmoe_pl.errors import ConfigError


def load_pretrained(kind: Any, name: str, argument: str, gguf_file: str | None = None, **kwargs: Any) -> Any:
    """What ``kind.from_pretrained(name, **kwargs)`` gives; of a GGUF file, dequantised.

    Args:
        kind: One of the ``Auto`` classes of transformers.
        name: Hub name or folder; or the path of a GGUF file in one of these.
        argument: What the user calls this setting, for the error.
        gguf_file: A GGUF file in ``name``, for the error under this name.
        kwargs: As ``from_pretrained`` takes them.

    Raises:
        ConfigError: If it is neither in a folder of that name nor on the hub, the hub cannot be reached,
            transformers does not know its type, or a GGUF file cannot be read.
    """
    reason: str
    cause: Exception
    said = f"{argument}={name!r}" if gguf_file is None else f"gguf_file={gguf_file!r}"
    try:
        if gguf_file is None and name.endswith(ENDING):
            name, gguf_file = folder_and_file(name)
        if gguf_file is None:
            return kind.from_pretrained(name, **kwargs)
        return _from_gguf(kind, name, gguf_file, said, kwargs)
    except OSError as error:
        reason, cause = "neither a folder nor a reachable hub name", error
        if gguf_file is not None:
            reason = "no such file on the hub"
    except (ValueError, NotImplementedError) as error:  # e.g. a type of model that transformers does not know
        if isinstance(error, ConfigError):
            raise
        reason, cause = "not what transformers can make", error
    raise ConfigError(f"{said}: {reason} ({str(cause).strip().splitlines()[0]})") from cause


def _from_gguf(kind: Any, folder: str, file: str, said: str, kwargs: dict[str, Any]) -> Any:
    contents = check_readable(folder, file, said)
    if kind.__name__ == "AutoTokenizer":
        return without_foreign_tokens(kind.from_pretrained(folder, gguf_file=file, **kwargs))
    loading = {} if kind.__name__ == "AutoConfig" else dense_loading()
    loaded = kind.from_pretrained(folder, gguf_file=file, **loading, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # which says what it found, too
    config = getattr(model, "config", model)
    check_positions(config, contents, said)
    vars(config).pop("_model_name_or_path", None)  # a title, and no name
    if model is not config:
        check_taken(model, contents, said)
    return loaded
