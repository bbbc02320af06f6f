"""What a routing decides: one expert a token."""

from typing import NamedTuple

import torch
from torch import Tensor


class Decision(NamedTuple):
    """One expert a token.

    Attributes:
        expert: ``(N,)`` int64 in ``[0, E)``.
        scale: What the expert's output is multiplied by, ``(N, 1)``; None for 1.
        balance_loss: Of :func:`load_balancing_loss`; None for routings that learn nothing.
    """

    expert: Tensor
    scale: Tensor | None = None
    balance_loss: Tensor | None = None


def most_probable(logits: Tensor) -> Decision:
    """The expert with the largest probability in each row of ``logits``, ``(M, E)``, scaled by that probability.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moebert.routing import most_probable
        >>> decision = most_probable(torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]))
        >>> decision.expert, decision.scale.round(decimals=2).squeeze(1)
        (tensor([2, 0]), tensor([0.7900, 0.5800]))
    """
    probabilities = logits.float().softmax(dim=-1)  # (M, E)
    largest = probabilities.max(dim=-1, keepdim=True)
    expert = largest.indices.squeeze(1)  # (M,)
    return Decision(expert, largest.values.to(logits.dtype), load_balancing_loss(probabilities, expert))


def load_balancing_loss(probabilities: Tensor, expert: Tensor) -> Tensor:
    """``E * sum_e (mean probability of e) * (share of rows sent to e)``; 1 when balanced, ``E`` when all go to one.

    Args:
        probabilities: Of a gate, ``(M, E)``, a row for each token or sentence; no padding among them.
        expert: Where each row is sent, ``(M,)``.

    Returns:
        A scalar, differentiable by the probabilities.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moebert.routing import load_balancing_loss
        >>> load_balancing_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
        tensor(2.)
    """
    num_experts = probabilities.shape[1]
    counts = torch.bincount(expert, minlength=num_experts)  # (E,)
    share = counts / counts.sum().clamp(min=1)
    return num_experts * (probabilities.mean(dim=0) * share).sum()
