"""What was converted in a model and how, as plain JSON, and the way back from there to the model's structure."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from d2dmoe_pl.moe.conversion import restore_moe_
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.moebert.conversion import restore_moebert_
from d2dmoe_pl.moebert.layer import METHOD

Layers = Mapping[str, Mapping[str, Any]]


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was converted and how, as plain JSON by layer name; :func:`restore_` is its inverse."""
    return {name: layer.describe() for name, layer in expert_layers(model).items()}


def restore_(model: nn.Module, layers: Layers) -> None:
    """Give a dense model the structure that :func:`describe` recorded; the weights are then loaded into it."""
    for name, made in layers.items():
        restore = restore_moebert_ if _is_moebert(made) else restore_moe_
        restore(model, name, made)


def stage_of(layers: Layers) -> str:
    """``dense``, ``experts`` or ``routed``: how far a conversion, as :func:`describe` gives it, has come."""
    if not layers:
        return "dense"
    return "routed" if all(_is_moebert(made) or made["router"] for made in layers.values()) else "experts"


def _is_moebert(made: Mapping[str, Any]) -> bool:
    return made.get("method") == METHOD
