"""The plain loop over experts, as implementations of MoE models commonly have it."""

from torch import Tensor


def loop(experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """Each expert finds its tokens, runs on them and adds to the output; as :mod:`d2dmoe_pl.moe.kernels`."""
    output = experts.down_bias_for(tokens).clone()  # (N, d)
    for expert in range(experts.num_experts):
        index = mask[:, expert].nonzero().squeeze(1)  # (n_e,)
        hidden = experts.hidden(tokens[index], expert)  # (n_e, s)
        output.index_add_(0, index, hidden @ experts.down_weight[expert])
    return output
