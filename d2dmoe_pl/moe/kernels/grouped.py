"""One small dense FFN an expert over the tokens that chose it: only executed (token, expert) pairs are computed."""

from torch import Tensor


def grouped(experts, tokens: Tensor, mask: Tensor) -> Tensor:
    """See :mod:`d2dmoe_pl.moe.kernels`; differentiable, runs anywhere."""
    pairs = mask.t().nonzero()  # (P, 2): expert, token; sorted by expert
    token_groups = pairs[:, 1].split(mask.sum(dim=0).tolist())  # E tensors of token indices
    output = experts.down_bias_for(tokens).clone()  # (N, d)
    for expert, index in enumerate(token_groups):
        if index.numel():
            hidden = experts.hidden(tokens.index_select(0, index), expert)  # (n_e, s)
            # autocast may compute the product in a narrower type than the sum is kept in
            output = output.index_add(0, index, (hidden @ experts.down_weight[expert]).to(output.dtype))
    return output
