"""What was converted in a model and how, as plain JSON, and the way back from there to the model's structure."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from d2dmoe_pl.moe.conversion import (
    ExpertsConfig,
    add_cutoffs_,
    add_routers_,
    add_stand_ins_,
    convert_to_moe_,
    set_backend_,
    set_gate_,
)
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig
from d2dmoe_pl.moebert.conversion import restore_moebert_
from d2dmoe_pl.moebert.layer import METHOD

Layers = Mapping[str, Mapping[str, Any]]


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was converted and how, as plain JSON by layer name; :func:`restore_` is its inverse."""
    return {name: layer.describe() for name, layer in expert_layers(model).items()}


def restore_(model: nn.Module, layers: Layers) -> None:
    """Give a dense model the structure that :func:`describe` recorded; the weights are then loaded into it."""
    for name, made in layers.items():
        restore = restore_moebert_ if _is_moebert(made) else _restore_moe_
        restore(model, name, made)


def stage_of(layers: Layers) -> str:
    """``dense``, ``experts`` or ``routed``: how far a conversion, as :func:`describe` gives it, has come."""
    if not layers:
        return "dense"
    return "routed" if all(_is_moebert(made) or made["router"] for made in layers.values()) else "experts"


def _is_moebert(made: Mapping[str, Any]) -> bool:
    return made.get("method") == METHOD


def _restore_moe_(model: nn.Module, name: str, made: Mapping[str, Any]) -> None:
    """Give the dense FFN ``name`` the structure that :meth:`MoELayer.describe` recorded."""

    def this(_: object, candidate: str) -> bool:
        return candidate == name

    convert_to_moe_(model, ExpertsConfig(made["num_experts"]), this)
    set_backend_(model, made["backend"], this)
    if made["router"] is not None:
        add_routers_(model, RouterConfig(**made["router"]), this)
    if made["gate"] is not None:
        set_gate_(model, GateConfig(**made["gate"]), this)
    if "stand_in" in made:
        add_stand_ins_(model, StandInConfig(**made["stand_in"]), this)
    if "cutoffs" in made:
        add_cutoffs_(model, CutoffConfig(**made["cutoffs"]), this)
