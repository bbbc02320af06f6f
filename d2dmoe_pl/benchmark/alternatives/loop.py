"""The plain loop over experts, as implementations of MoE models commonly have it."""

from torch import Tensor

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.experts.ffn_math import hidden_activations, output_of_no_expert


def loop(experts: Experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """Each expert finds its tokens, runs on them and adds to the output; as :mod:`d2dmoe_pl.moe.execution`."""
    up_weight, *inner, down_weight, down_bias = experts.weights_in(tokens.dtype)
    output = output_of_no_expert(tokens, down_bias, down_weight.shape[2])  # (N, d_out)
    for expert in range(experts.num_experts):
        index = mask[:, expert].nonzero().squeeze(1)  # (n_e,)
        up_bias, gate_weight, gate_bias = (None if rows is None else rows[expert] for rows in inner)
        hidden = hidden_activations(  # (n_e, s)
            experts.activation, tokens[index], up_weight[expert], up_bias, gate_weight, gate_bias
        )
        output.index_add_(0, index, hidden @ down_weight[expert])
    return output


BACKEND = loop
