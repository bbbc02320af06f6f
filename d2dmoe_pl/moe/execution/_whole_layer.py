"""Router, gate and experts in one operator on the CPU (``csrc``), where all three are ones that it has.

It does what they do one after the other, for tokens that are no padding; where somebody watches them, or something is
of another kind, they run one after the other.
"""

from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.moe.execution._eligibility import has_active_dropout, is_traced, is_watched, needs_gradients
from d2dmoe_pl.moe.execution.cpu import TYPES, compile_failure
from d2dmoe_pl.moe.experts.experts import Experts, own_tensors, weights_to_pack
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.routers import Router
from d2dmoe_pl.moe.routers.regression import RegressionRouter
from d2dmoe_pl.moe.stand_ins.stand_in import StandIn

RULES = ("dynk_max", "dynk_cumulative", "topk")
BACKENDS_TOO = ("auto", "cpu")  # that experts alone would run on the operator by
STAND_IN = ("down", "up")


def can_run_whole(
    experts: Experts, router: Router | None, gate: Gate | None, stand_in: StandIn | None, x: Tensor
) -> bool:
    """Whether :func:`run_whole` can run this call."""
    inside: Any = experts._modules
    # asked at every call: past nn.Module's lookup, and what takes longest last
    return (
        gate is not None
        and x.is_cpu
        and type(router) is RegressionRouter
        and gate.config.rule in RULES
        and experts.backend in BACKENDS_TOO
        and experts.activation_kind is not None
        and x.dtype in TYPES
        and not is_watched(experts, router, gate, inside["activation"], inside["hidden_dropout"])
        and not torch.is_autocast_enabled("cpu")
        and (experts.is_quantized or x.dtype == own_tensors(experts, ("up_weight",))[0].dtype)
        and router.is_quantized == experts.is_quantized
        and (stand_in is None or _can_stand_in(stand_in, x))
        and not needs_gradients(_tensors(experts, router, stand_in, x))
        and not has_active_dropout(experts)
        and not is_traced()
        and compile_failure() is None
    )


def run_whole(
    experts: Experts, router: Any, gate: Any, stand_in: Any, cutoffs: Any, x: Tensor, real: Tensor | None
) -> Tensor:
    """What the experts that the gate admits by the router's scores give, and what stands in for the others.

    Args:
        experts: Of the layer.
        router: The same; a ``RegressionRouter``.
        gate: The same.
        stand_in: The same; None for nothing.
        cutoffs: The same.
        x: ``P`` positions, ``(..., d_model)``.
        real: Which of them hold tokens, ``(P,)`` boolean; None if all do.

    Returns:
        ``(..., d_out)``; rows of padding are zeros.
    """
    config = gate.config
    return torch.ops.d2dmoe_pl.moe_layer_cpu.default(
        x,
        real,
        weights_to_pack(router),
        config.rule,
        gate.tau,
        config.k or 0,
        None if stand_in is None else own_tensors(stand_in, STAND_IN),
        weights_to_pack(experts),
        experts.activation_kind,
        None if cutoffs is None else cutoffs.values,
        1.0 if cutoffs is None else cutoffs.config.full_tau,
    )


def _tensors(experts: Experts, router: Any, stand_in: StandIn | None, x: Tensor) -> list[Tensor | None]:
    """All that gradients may be wanted of; none where they are not, which is what mostly happens."""
    if not torch.is_grad_enabled():
        return []
    return [x, *experts.weights, *router.weights, *([] if stand_in is None else own_tensors(stand_in, STAND_IN))]


def _can_stand_in(stand_in: StandIn, x: Tensor) -> bool:
    return (
        type(stand_in) is StandIn and own_tensors(stand_in, STAND_IN)[0].dtype == x.dtype and not is_watched(stand_in)
    )
