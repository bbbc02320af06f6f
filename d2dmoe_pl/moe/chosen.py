"""What routings that choose one expert a token are given, and what they give."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingSizes:
    """What a routing is made for.

    Attributes:
        num_experts: ``E``.
        d_model: Width of the tokens.
        vocabulary_size: How many token ids there are; None for models of anything but text.
        seed: Of what is drawn at random.
    """

    num_experts: int
    d_model: int
    vocabulary_size: int | None
    seed: int


class Chosen(NamedTuple):
    """One expert a token.

    Attributes:
        expert: ``(N,)`` int64 in ``[0, E)``.
        scale: What the expert's output is multiplied by, ``(N, 1)``; None for 1.
        balance_loss: Of :func:`load_balancing_loss`; None for routings that learn nothing.
    """

    expert: Tensor
    scale: Tensor | None = None
    balance_loss: Tensor | None = None


def choose(logits: Tensor) -> Chosen:
    """The expert with the largest probability in each row of ``logits``, ``(M, E)``, scaled by that probability."""
    probabilities = logits.float().softmax(dim=-1)  # (M, E)
    largest = probabilities.max(dim=-1, keepdim=True)
    expert = largest.indices.squeeze(1)  # (M,)
    return Chosen(expert, largest.values.to(logits.dtype), load_balancing_loss(probabilities, expert))


def load_balancing_loss(probabilities: Tensor, expert: Tensor) -> Tensor:
    """``E * sum_e (mean probability of e) * (share of rows sent to e)``; 1 when balanced, ``E`` when all go to one.

    Args:
        probabilities: Of a gate, ``(M, E)``, a row for each token or sentence; no padding among them.
        expert: Where each row is sent, ``(M,)``.

    Returns:
        A scalar, differentiable by the probabilities.
    """
    num_experts = probabilities.shape[1]
    share = torch.bincount(expert, minlength=num_experts) / max(1, len(expert))  # (E,)
    return num_experts * (probabilities.mean(dim=0) * share).sum()
