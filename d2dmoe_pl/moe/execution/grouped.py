"""One small dense FFN an expert over the tokens that chose it: only executed (token, expert) pairs are computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.cutoffs.cutoffs import cut
from d2dmoe_pl.moe.execution._eligibility import obstacle
from d2dmoe_pl.moe.execution.reference import reference
from d2dmoe_pl.moe.experts.activation_kinds import KNOWN
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.experts.ffn_math import hidden_activations, output_of_no_expert


def grouped(
    experts: Experts,
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.execution`; differentiable, runs anywhere.

    How many tokens an expert gets is not known when ``torch.compile`` traces, so that there the whole is one operator,
    which has no gradients; calls that need them, or autocast, run as ``reference`` there, and so do those that
    ``torch.jit`` traces or that are exported to ONNX.
    """
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        weights = experts.weights_in(tokens.dtype)
        return _run(experts.activation, experts.hidden_dropout, tokens, mask, cutoff, gate_cutoff, *weights)
    if torch.is_autocast_enabled(tokens.device.type) or obstacle(experts, tokens, [tokens.dtype]) is not None:
        return reference(experts, tokens, mask, cutoff, gate_cutoff)
    weights = experts.weights_in(tokens.dtype)
    return moe_grouped(tokens, mask, *weights, experts.activation_kind, cutoff, gate_cutoff)


def _run(
    activation: Callable[[Tensor], Tensor],
    dropout: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask: Tensor,
    cutoff: Tensor | None,
    gate_cutoff: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    pairs = mask.t().nonzero()  # (P, 2): expert, token; sorted by expert
    token_groups = pairs[:, 1].split(mask.sum(dim=0).tolist())  # E tensors of token indices
    start = output_of_no_expert(tokens, down_bias, down_weight.shape[2])  # (N, d_out)
    # a narrow type, or autocast's, is for products; sums are kept in float32 or wider
    output = start.to(torch.promote_types(start.dtype, torch.float32))

    def part(rows: Tensor | None, expert: int) -> Tensor | None:
        return None if rows is None else rows[expert]

    for expert, index in enumerate(token_groups):
        if index.numel():
            up_bias_e, gate_weight_e, gate_bias_e = (part(rows, expert) for rows in (up_bias, gate_weight, gate_bias))
            inputs = tokens.index_select(0, index)  # (n_e, d)
            hidden = hidden_activations(
                activation, inputs, up_weight[expert], up_bias_e, gate_weight_e, gate_bias_e, gate_cutoff
            )
            hidden = hidden if cutoff is None else cut(hidden, cutoff)
            output.index_add_(0, index, (dropout(hidden) @ down_weight[expert]).to(output.dtype))
    device = tokens.device.type
    return output.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else start.dtype)


@torch.library.custom_op("d2dmoe_pl::moe_grouped", mutates_args=())
def moe_grouped(
    tokens: Tensor,
    mask: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    cutoff: Tensor | None = None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """The operator under :func:`grouped`; shapes as in ``Experts``, ``activation`` a key of ``KNOWN``."""
    weights = (up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    return _run(KNOWN[activation], nn.Identity(), tokens, mask, cutoff, gate_cutoff, *weights)


@moe_grouped.register_fake
def _(tokens: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    down_weight = rest[4]
    return tokens.new_empty(tokens.shape[0], down_weight.shape[2])


BACKEND = grouped
