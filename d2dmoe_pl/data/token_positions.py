"""How many tokens a model of Hugging Face has positions for."""

from typing import Any


def num_token_positions(model: Any) -> int | None:
    """Tokens that a text can have at most for ``model``, of Hugging Face; None where there is no limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)  # they begin after padding's, as RoBERTa's do
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None or positions < 0 else int(positions)  # some say so that there is no limit
