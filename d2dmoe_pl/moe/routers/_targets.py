"""What routers are trained to predict, from activations that the frozen model computes anyway."""

from typing import Literal

import torch
from torch import Tensor

Target = Literal["norm", "relative_norm", "activation_sum"]


def router_targets(target: Target, hidden: Tensor, gram: Tensor) -> Tensor:
    """What a router is to give for tokens.

    Args:
        target: Of its config.
        hidden: Activations of the experts, ``(N, E, s)``.
        gram: :func:`gram_matrices` of the experts, ``(E, s, s)``, for norms.

    Returns:
        ``(N, E)``.
    """
    if target == "activation_sum":
        return activation_sums(hidden)
    norms = output_norms(hidden, gram)
    return norms if target == "norm" else relative_norms(norms)


def gram_matrices(down_weight: Tensor) -> Tensor:
    """``G_e = W2_e^T W2_e`` of every expert, constant while the experts are: ``(E, s, d)`` to ``(E, s, s)``."""
    return down_weight @ down_weight.transpose(1, 2)


def output_norms(hidden: Tensor, gram: Tensor) -> Tensor:
    """``||expert_e(x)||_2`` without the output bias: D2DMoE (arXiv 2310.04361), section 3.3.

    Computed as ``sqrt(h^T G_e h)``, so that no ``(E, N, d)`` tensor of expert outputs is ever made.

    Args:
        hidden: Activations of the experts, ``(N, E, s)``.
        gram: :func:`gram_matrices` of the experts, ``(E, s, s)``.

    Returns:
        ``(N, E)``.
    """
    if hidden.dtype == torch.float16:
        hidden = hidden.float()  # in which squares of norms from 256 on are not infinite
    per_expert = hidden.transpose(0, 1)  # (E, N, s)
    with torch.autocast(hidden.device.type, enabled=False):
        squared = torch.einsum("ens,ens->ne", torch.bmm(per_expert, gram.to(hidden.dtype)), per_expert)
    return squared.clamp(min=0).sqrt()  # rounding can leave a tiny negative where the norm is zero


def relative_norms(norms: Tensor) -> Tensor:
    """Norms over the mean of the same token's: ``(N, E)`` to ``(N, E)``.

    Where norms differ by orders of magnitude between tokens and layers, as in language models, a few tokens would
    decide all that a router learns; gating rules compare the experts of one token alone.
    """
    return norms / norms.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)


def activation_sums(hidden: Tensor) -> Tensor:
    """``sum_j |h_j|`` of each expert over the batch's largest, as in the d2dmoe package: ``(N, E)`` in [0, 1]."""
    return share_of_largest(hidden.abs().sum(dim=-1))


def positive_sums(hidden: Tensor) -> Tensor:
    """``sum max(h, 0)`` of each expert: ``(N, E, s)`` to ``(N, E)``; MoEfication (arXiv 2110.01786), section 3.2."""
    return hidden.clamp(min=0).sum(dim=-1)


def share_of_largest(sums: Tensor) -> Tensor:
    """``sums``, not negative, over the largest of them: in [0, 1], of the same shape."""
    return sums / sums.amax().clamp(min=torch.finfo(sums.dtype).tiny)
