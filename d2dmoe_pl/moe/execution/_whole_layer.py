"""Router, gate and experts in one operator on the CPU (``csrc``), where all three are ones that it has.

It does what they do one after the other, for tokens that are no padding; where somebody watches them, or something is
of another kind, they run one after the other.
"""

from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.execution._eligibility import has_active_dropout, needs_gradients
from d2dmoe_pl.moe.execution.cpu import TYPES, compile_failure
from d2dmoe_pl.moe.experts.experts import Experts, weights_to_pack
from d2dmoe_pl.moe.gating import Gate
from d2dmoe_pl.moe.routers import Router
from d2dmoe_pl.moe.routers.regression import RegressionRouter
from d2dmoe_pl.moe.stand_ins.stand_in import StandIn

RULES = ("dynk_max", "dynk_cumulative", "topk")
BACKENDS_TOO = ("auto", "cpu")  # that experts alone would run on the operator by


def can_run_whole(
    experts: Experts, router: Router | None, gate: Gate | None, stand_in: StandIn | None, positions: Tensor
) -> bool:
    """Whether :func:`run_whole` can run this call."""
    return (
        gate is not None
        and positions.device.type == "cpu"
        and type(router) is RegressionRouter
        and gate.config.rule in RULES
        and experts.backend in BACKENDS_TOO
        and experts.activation_kind is not None
        and positions.dtype in TYPES
        and (experts.is_quantized or positions.dtype == experts.up_weight.dtype)
        and router.is_quantized == experts.is_quantized
        and (stand_in is None or (type(stand_in) is StandIn and stand_in.down.dtype == positions.dtype))
        and not torch.is_autocast_enabled("cpu")
        and not (_is_watched(experts) or _is_watched(router) or _is_watched(gate))
        and (stand_in is None or not _is_watched(stand_in))
        and not needs_gradients(experts, positions)
        and not has_active_dropout(experts)
        and not torch.onnx.is_in_onnx_export()
        and compile_failure() is None
    )


def run_whole(
    experts: Experts, router: Any, gate: Any, stand_in: Any, positions: Tensor, real: Tensor | None
) -> Tensor:
    """What the experts that the gate admits by the router's scores give, and what stands in for the others.

    Args:
        experts: Of the layer.
        router: The same; a ``RegressionRouter``.
        gate: The same.
        stand_in: The same; None for nothing.
        positions: ``(P, d_model)``.
        real: Which of them hold tokens, ``(P,)`` boolean; None if all do.

    Returns:
        ``(P, d_out)``; rows of padding are zeros.
    """
    config = gate.config
    return torch.ops.d2dmoe_pl.moe_layer_cpu.default(
        positions,
        real,
        weights_to_pack(router),
        config.rule,
        gate.tau,
        config.k or 0,
        [] if stand_in is None else [stand_in.down, stand_in.up],
        weights_to_pack(experts),
        experts.activation_kind,
    )


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
