"""How the vectors of a text's tokens become the text's, as a folder of sentence-transformers says it."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check, one_line

Pooling = Literal["mean", "cls", "max", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "max", "last")
MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"  # has what stands before texts, among others
TOKENS = "sentence_bert_config.json"  # says whether texts are in lower case, whatever the tokenizer does
NEWER: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}  # as newer versions write
NAMES: dict[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}


def pooled(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """The vectors of texts.

    Args:
        states: Of their tokens, ``(B, L, d)``.
        mask: ``(B, L)``, 0 for padding; None where there is none.
        pooling: The ``mean`` of all tokens, the first (``cls``), the largest of each coordinate (``max``), or the last.

    Returns:
        ``(B, d)``.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.data.embeddings.pooling import pooled
        >>> pooled(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
        tensor([[2.]])
    """
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    if pooling in ("cls", "last"):  # padding can be on either side
        places = torch.arange(states.shape[1], device=states.device).expand(mask.shape)  # (B, L)
        first, last = places.masked_fill(mask == 0, states.shape[1] - 1).amin(dim=1), (places * (mask != 0)).amax(dim=1)
        place = first if pooling == "cls" else last  # (B,)
        return states.gather(1, place[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    weights = mask.unsqueeze(2).to(states.dtype)  # (B, L, 1)
    if pooling == "max":
        return states.masked_fill(weights == 0, torch.finfo(states.dtype).min).amax(dim=1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pooling_of(model: str | Path) -> Pooling | None:
    """The pooling that a model of sentence-transformers says, a folder or a name on the hub; None where it is none.

    Raises:
        ConfigError: If it is another than those of :func:`pooled`, or the hub does not say.
    """
    modules = _read(model, MODULES)
    if modules is None:
        return None
    path = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    config = _pooling_config(model, path) if path else {}
    mode = config.get("pooling_mode")
    if isinstance(mode, str) and mode in NEWER:
        return NEWER[mode]
    given = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    found = [pooling for pooling, name in NAMES.items() if given == [name]]
    if not found:
        given = given or ([mode] if isinstance(mode, str) else mode or ["nothing"])
        raise ConfigError(f"{model}: pools by {', '.join(given)}; must be one of {', '.join(POOLINGS)}")
    return found[0]


def check_modules(model: str | Path) -> None:
    """Raise ``ConfigError`` if a model of sentence-transformers computes vectors in a way that is not computed here.

    Such are layers behind the pooling that change vectors, and a prompt that is left out of the pooling.
    """
    modules = _read(model, MODULES) or ()
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    check(not others, f"{model}: has a {', '.join(others)} behind its pooling, which is not computed here")
    prompts = _beside(model).get("prompts") or {}
    pools = [_pooling_config(model, each["path"]) for each in modules if each["type"].endswith("Pooling")]
    is_left_out = any(prompts.values()) and any(each.get("include_prompt") is False for each in pools)
    check(not is_left_out, f"{model}: leaves its prompts out of its pooling, which is not computed here")


def default_prompt(model: str | Path) -> str:
    """What a model of sentence-transformers puts before every text that comes without a prompt of its own."""
    said = _beside(model)
    return (said.get("prompts") or {}).get(said.get("default_prompt_name")) or ""


def normalizes(model: str | Path) -> bool:
    """Whether vectors get length 1: as a model of sentence-transformers says, and where there is no such model."""
    modules = _read(model, MODULES)
    return modules is None or any(module["type"].endswith("Normalize") for module in modules)


def has_lower_case(model: str | Path) -> bool:
    """Whether a model of sentence-transformers reads every text in lower case."""
    return _file(model, MODULES) is not None and bool((_read(model, TOKENS) or {}).get("do_lower_case"))


def write_modules(folder: Path, pooling: Pooling, width: int, model: str | Path | None = None) -> None:
    """Make ``folder``, a Hugging Face model with its tokenizer, one of sentence-transformers.

    Args:
        folder: Gets the files.
        pooling: What it says.
        width: Of its vectors.
        model: Whose prompts it has, a folder or a name on the hub, and whose vectors' lengths, if they have any but 1.
    """
    base = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if normalizes(model or ""):
        modules.append(("2_Normalize", "Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{base}.{kind}"} for i, (path, kind) in enumerate(modules)
    ]
    (folder / MODULES).write_text(json.dumps(listed, indent=2))
    for path, _ in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    modes = {name: name == NAMES[pooling] for name in NAMES.values()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": width, **modes}, indent=2)
    )
    if model is not None and (beside := _beside(model)):
        (folder / PROMPTS).write_text(json.dumps(beside, indent=2))


def _pooling_config(model: str | Path, path: str) -> dict[str, Any]:
    config = _read(model, f"{path}/config.json")
    check(config is not None, f"{model}: {MODULES} names {path}, which has no config.json; must be whole")
    assert config is not None
    return config


def _beside(model: str | Path) -> dict[str, Any]:
    """What a model of sentence-transformers says beside its modules, prompts among it; nothing if it is none."""
    return {} if _file(model, MODULES) is None else _read(model, PROMPTS) or {}


def _read(model: str | Path, name: str) -> Any:
    """What a JSON file of a model holds; None where there is no such file."""
    file = _file(model, name)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def _file(model: str | Path, name: str) -> str | None:
    """The path of a file of a model, in its folder or fetched from the hub; None where there is none."""
    if not str(model) or Path(model).is_dir():  # nothing, where a model is made from scratch
        file = Path(model) / name
        return str(file) if str(model) and file.is_file() else None
    try:
        return hf_hub_download(str(model), name)
    except (OSError, EntryNotFoundError, HfHubHTTPError) as error:
        is_reached = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if is_reached or try_to_load_from_cache(str(model), name) is _CACHED_NO_EXIST:
            return None
        said = one_line(str(error))  # it may be there, and is not known
        raise ConfigError(
            f"{model}: {name}, by which it says how it makes vectors, cannot be fetched from the hub ({said})"
        ) from error
