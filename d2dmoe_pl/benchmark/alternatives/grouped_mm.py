"""PyTorch's own product of groups of rows, each with a matrix of its own."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.experts.ffn_math import output_of_no_expert


def grouped_mm(experts: Experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """All experts in one call a product; as :mod:`d2dmoe_pl.moe.execution`.

    Raises:
        ConfigError: If this version of PyTorch has no ``torch.nn.functional.grouped_mm``, or rows are of a width that
            it does not take.
    """
    check(
        hasattr(F, "grouped_mm"),
        f"compare='grouped_mm': torch {torch.__version__} has no torch.nn.functional.grouped_mm",
    )
    for width in (experts.d_model, experts.expert_dim, experts.d_out):
        size = width * tokens.element_size()
        check(
            size % 16 == 0,
            f"compare='grouped_mm': rows of {width} numbers in {tokens.dtype} are {size} bytes; must be a multiple of "
            "16, by another number of experts; or leave it out",
        )
    expert, token = mask.t().nonzero().unbind(1)  # (P,) each, sorted by expert
    ends = mask.sum(dim=0).cumsum(0).to(torch.int32)  # (E,): where each expert's rows end
    rows = tokens.index_select(0, token)  # (P, d)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        product = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)  # (P, d) @ (E, d, s) -> (P, s)
        return product if bias is None else product + bias[expert]

    up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias = experts.weights_in(tokens.dtype)
    hidden = project(up_weight, up_bias)
    if gate_weight is not None:
        hidden = experts.activation(project(gate_weight, gate_bias)) * hidden
    else:
        hidden = experts.activation(hidden)
    output = output_of_no_expert(tokens, down_bias, experts.d_out)  # (N, d_out)
    return output.index_add_(0, token, F.grouped_mm(hidden, down_weight, offs=ends))


BACKEND = grouped_mm
