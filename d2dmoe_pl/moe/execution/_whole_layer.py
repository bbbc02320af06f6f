"""Router, gate and experts in one operator on the CPU (``csrc``), where all three are ones that it has.

It does what they do one after the other, for tokens that are no padding; where somebody watches them, or something is
of another kind, they run one after the other.
"""

from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.moe.execution._eligibility import (
    has_active_dropout,
    is_transformed_or_traced,
    is_watched,
    needs_gradients,
)
from d2dmoe_pl.moe.execution.cpu import TYPES, compile_failure
from d2dmoe_pl.moe.experts.experts import Experts, own_tensors, to_pack
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.routers import Router
from d2dmoe_pl.moe.routers.regression import RegressionRouter
from d2dmoe_pl.moe.stand_ins.stand_in import StandIn

RULES = ("dynk_max", "dynk_cumulative", "topk")
BACKENDS_TOO = ("auto", "cpu")  # that experts alone would run on the operator by
STAND_IN = ("down", "up")


def run_whole(
    experts: Experts,
    router: Router | None,
    gate: Gate | None,
    stand_in: StandIn | None,
    cutoffs: Any,
    x: Tensor,
    real: Tensor | None,
) -> Tensor | None:
    """What the experts that the gate admits by the router's scores give, and what stands in for the others.

    Args:
        experts: Of the layer.
        router: The same.
        gate: The same.
        stand_in: The same; None for nothing.
        cutoffs: The same.
        x: ``P`` positions, ``(..., d_model)``.
        real: Which of them hold tokens, ``(P,)`` boolean; None if all do.

    Returns:
        ``(..., d_out)``, in which rows of padding are zeros; None where the operator cannot run this call.
    """
    # All of this is asked at every call: each once, past nn.Module's lookup, and what takes longest last.
    if gate is None or type(router) is not RegressionRouter or not x.is_cpu or x.dtype not in TYPES:
        return None
    config: Any = gate.config
    kind, inside = experts.activation_kind, experts._modules
    activation: Any = inside["activation"]
    dropout: Any = inside["hidden_dropout"]
    if kind is None or config.rule not in RULES or experts.backend not in BACKENDS_TOO:
        return None
    if is_watched(experts, router, gate, activation, dropout) or has_active_dropout(experts):
        return None
    weights, is_quantized = experts.weights, experts.is_quantized
    if router.is_quantized != is_quantized or not (is_quantized or x.dtype == weights[0].dtype):
        return None
    if stand_in is not None and (type(stand_in) is not StandIn or is_watched(stand_in)):
        return None
    of_router = router.weights
    of_stand_in = None if stand_in is None else own_tensors(stand_in, STAND_IN)
    if of_stand_in is not None and of_stand_in[0].dtype != x.dtype:
        return None
    if torch.is_autocast_enabled("cpu") or is_transformed_or_traced() or compile_failure() is not None:
        return None
    if torch.is_grad_enabled() and needs_gradients((x, *weights, *of_router, *(of_stand_in or ()))):
        return None
    return torch.ops.d2dmoe_pl.moe_layer_cpu.default(
        x,
        real,
        to_pack(router, of_router),
        config.rule,
        gate.tau,
        config.k or 0,
        of_stand_in,
        to_pack(experts, weights),
        kind,
        None if cutoffs is None else cutoffs.values,
        1.0 if cutoffs is None else cutoffs.config.full_tau,
    )
