"""How the vectors of a text's tokens become the text's, as a folder of sentence-transformers says it."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check

Pooling = Literal["mean", "cls", "max", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "max", "last")
MODULES = "modules.json"
NAMES: dict[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}


def pooled(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """The vectors of texts.

    Args:
        states: Of their tokens, ``(B, L, d)``, padding behind.
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
    if pooling == "cls":
        return states[:, 0]
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    if pooling == "last":
        last = mask.long().sum(dim=1) - 1  # (B,)
        return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    weights = mask.unsqueeze(2).to(states.dtype)  # (B, L, 1)
    if pooling == "max":
        return states.masked_fill(weights == 0, torch.finfo(states.dtype).min).amax(dim=1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def pooling_of(folder: str | Path) -> Pooling | None:
    """The pooling that a folder of sentence-transformers says; None where it is none.

    Raises:
        ConfigError: If it is another than those of :func:`pooled`.
    """
    modules = _modules(folder)
    if modules is None:
        return None
    path = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    file = Path(folder) / str(path) / "config.json"
    check(path is None or file.is_file(), f"{folder}: {MODULES} names {path}, which has no config.json; must be whole")
    config = json.loads(file.read_text()) if path else {}
    if config.get("pooling_mode") in POOLINGS:
        return config["pooling_mode"]  # as newer versions write it
    given = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    found = [pooling for pooling, name in NAMES.items() if given == [name]]
    if not found:
        raise ConfigError(f"{folder}: pools by {', '.join(given) or 'nothing'}; must be one of {', '.join(POOLINGS)}")
    return found[0]


def check_modules(folder: str | Path) -> None:
    """Raise ``ConfigError`` if a folder of sentence-transformers has layers behind the pooling that change vectors."""
    kinds = [module["type"].rpartition(".")[2] for module in _modules(folder) or ()]
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    check(not others, f"{folder}: has a {', '.join(others)} behind its pooling, which is not computed here")


def write_modules(folder: Path, pooling: Pooling, width: int) -> None:
    """Make ``folder``, a Hugging Face model with its tokenizer, one of sentence-transformers; vectors get length 1."""
    base = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{base}.{kind}"} for i, (path, kind) in enumerate(modules)
    ]
    (folder / MODULES).write_text(json.dumps(listed, indent=2))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    modes = {name: name == NAMES[pooling] for name in NAMES.values()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": width, **modes}, indent=2)
    )


def _modules(folder: str | Path) -> list[dict[str, Any]] | None:
    file = Path(folder) / MODULES
    return json.loads(file.read_text()) if file.is_file() else None
