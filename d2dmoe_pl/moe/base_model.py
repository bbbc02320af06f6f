"""What is under the head of a converted Hugging Face model, able to do without it."""

from dataclasses import replace
from typing import Any

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.moe.budgets.budget_path import budget_path, set_budget_path_
from d2dmoe_pl.moe.find_layers import expert_layers


def without_head(model: Any) -> Any:
    """The model under the head, with what was around it: its view of the batch, its way to be saved, its budgets.

    Args:
        model: A ``PreTrainedModel``, which must not be used any more.

    Returns:
        Its ``base_model``; of a model without a head, ``model``.
    """
    base, prefix = model.base_model, f"{model.base_model_prefix}."
    if base is model:
        return model
    for layer in expert_layers(base).values():
        layer.context.move(model, base)
    path = budget_path(model)
    if path is not None:
        set_budget_path_(base, replace(path, layers=tuple(name.removeprefix(prefix) for name in path.layers)))
    adapter_for(base).mark_converted_(base)
    return base
