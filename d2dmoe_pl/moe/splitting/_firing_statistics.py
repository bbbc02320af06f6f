"""What splits that go by activations are given: sums over tokens of which neurons fire, and how strongly.

Every sum is of integers that depend on one token each, so it is the same to the bit however samples are batched or
spread over processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

STRENGTHS = 4  # levels of activation that co-activation tells apart
FIRING_SHARE = 0.25  # of neurons, where none is exactly zero


@dataclass(frozen=True)
class CountedTokens:
    """The tokens of a batch that are counted.

    Attributes:
        samples: Of each counted sample, in order, its number in the data and how many tokens it has.
        dim: ``p``, the dimensions that profiles are projected to.
        seed: Of the projection.
        device: Where activations are.
    """

    samples: Sequence[tuple[int, int]]
    dim: int
    seed: int
    device: torch.device

    @cached_property
    def signs(self) -> Tensor:
        """The tokens' random signs, ``(N, p)``; drawn once a batch, not once an FFN."""
        drawn = [sample_signs(number, count, self.dim, self.seed) for number, count in self.samples]
        return torch.cat([torch.zeros(0, self.dim), *drawn]).to(self.device)


def fired(activation: Tensor, is_sparse: bool) -> Tensor:
    """How strongly neurons fire, with exact zeros where they do not.

    Args:
        activation: After the activation function, ``(N, d_ff)``.
        is_sparse: Whether that gives exact zeros (ReLU). Where it does not (SiLU, GELU), the quarter of a token's
            neurons with the largest ``|a|`` counts as firing.

    Returns:
        ``(N, d_ff)``, not negative where ``is_sparse`` is false.
    """
    if is_sparse or not len(activation):
        return activation
    strength = activation.abs()
    firing = max(1, round(FIRING_SHARE * strength.shape[1]))
    largest = strength.topk(firing, dim=1)
    return torch.zeros_like(strength).scatter(1, largest.indices, largest.values)


def profile(activation: Tensor, tokens: CountedTokens) -> Tensor:
    """Which tokens each neuron fires for, projected at random so that it fits in memory.

    The 0/1 firing matrix ``(N, d_ff)`` is multiplied by a matrix of random signs ``(N, p)``; inner products between
    neurons survive (Achlioptas, 2003).

    Args:
        activation: After the activation function, ``(N, d_ff)``.
        tokens: The ``N`` tokens.

    Returns:
        ``(d_ff, p)``, integers in float32; sums of up to 2^24 tokens are exact.
    """
    return (activation > 0).to(tokens.signs.dtype).t() @ tokens.signs  # (d_ff, N) @ (N, p)


def coactivation(activation: Tensor, tokens: CountedTokens) -> Tensor:
    """How often and how strongly two neurons fire together: MoEfication (arXiv 2110.01786), section 3.1.

    The paper sums products of activations. Here a token's activations are first rounded up to quarters of its largest,
    which leaves integers.

    Args:
        activation: After the activation function, ``(N, d_ff)``.
        tokens: The ``N`` tokens.

    Returns:
        ``(d_ff, d_ff)``, symmetric, integers in float32; sums of up to 2^20 tokens are exact.
    """
    fired = activation.float().clamp(min=0)
    largest = fired.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(fired.dtype).tiny)
    strength = (fired / largest * STRENGTHS).ceil()  # (N, d_ff)
    return strength.t() @ strength


def sample_signs(sample: int, num_tokens: int, dim: int, seed: int) -> Tensor:
    """The random signs of one sample's tokens: ``(num_tokens, dim)`` of -1 and 1, a function of its arguments alone."""
    # torch's CPU generator looks at the low 32 bits of its seed only
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**32)
    return torch.randint(0, 2, (num_tokens, dim), generator=generator).mul_(2).sub_(1).float()
