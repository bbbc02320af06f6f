"""What comes from a folder or the hub: tokenizers, image processors, models and their configurations."""

import pickle
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from d2dmoe_pl.data.gguf_files import (
    ENDING,
    check_positions,
    check_readable,
    check_taken,
    dense_loading,
    folder_and_file,
    without_foreign_tokens,
)
from d2dmoe_pl.errors import ConfigError, check, one_line

# what a file that was not downloaded whole, or is another in its place, raises
BROKEN = (SafetensorError, pickle.UnpicklingError, EOFError)
# e.g. of a type of model that is not known; tokenizers, which is not in Python, raises plain exceptions
REFUSALS = (ValueError, NotImplementedError, StrictDataclassError)
OF_PIECES = re.compile(r"tiktoken.? is required|Error parsing line .* in .*\.model")  # what is tried as a last resort


def load_pretrained(kind: Any, name: str, argument: str, gguf_file: str | None = None, **kwargs: Any) -> Any:
    """What ``kind.from_pretrained(name, **kwargs)`` gives; of a GGUF file, dequantised.

    Args:
        kind: One of the ``Auto`` classes of transformers.
        name: Hub name or folder; or the path of a GGUF file in one of these.
        argument: What the user calls this setting, for the error.
        gguf_file: A GGUF file in ``name``, for the error under this name.
        kwargs: As ``from_pretrained`` takes them.

    Raises:
        ConfigError: If it is neither in a folder of that name nor on the hub, the hub cannot be reached, a file is
            missing or broken, transformers does not know its type, or a GGUF file cannot be read.
    """
    said = f"{argument}={name!r}" if gguf_file is None else f"gguf_file={gguf_file!r}"
    try:
        if gguf_file is None and name.endswith(ENDING):
            name, gguf_file = folder_and_file(name)
        if gguf_file is None:
            return kind.from_pretrained(name, **kwargs)
        return _from_gguf(kind, name, gguf_file, said, kwargs)
    except OSError as error:
        if gguf_file is None:
            _check_no_gguf(name, said)
        reason = "neither a folder nor a reachable hub name"
        if gguf_file is not None:
            reason = "no such file on the hub"
        elif Path(name).is_dir():
            reason = "a file in the folder is missing or broken"
        raise ConfigError(f"{said}: {reason} ({one_line(str(error))})") from error
    except BROKEN as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{said}: a file of weights is not whole; must be copied or downloaded anew ({first})"
        ) from error
    except Exception as error:
        if isinstance(error, ConfigError) or not (isinstance(error, REFUSALS) or type(error) is Exception):
            raise
        check(
            OF_PIECES.search(str(error)) is None,
            f"{said}: has its words in a file of sentencepiece, which cannot be read; must have a tokenizer.json, or "
            "pip install sentencepiece protobuf",
        )
        is_adapter = (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file()
        check(
            not is_adapter,
            f"{said}: is an adapter of PEFT without its model; must be the model with it merged in, by "
            "merge_and_unload() and save_pretrained",
        )
        if gguf_file is None:
            _check_no_gguf(name, said)
        raise ConfigError(f"{said}: not what transformers can make ({one_line(str(error))})") from error


def _check_no_gguf(name: str, said: str) -> None:
    """Raise ``ConfigError`` for a folder of GGUF files, which is no model by itself; for nothing else."""
    files = [] if (Path(name) / "config.json").is_file() else sorted(Path(name).glob(f"*{ENDING}"))
    check(not files, f"{said}: is a folder of GGUF files; must be one of them, such as {files[0] if files else ''}")


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
