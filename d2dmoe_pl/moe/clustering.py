"""Balanced k-means, and the activation profiles it may act on."""

import torch
from k_means_constrained import KMeansConstrained
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F


def balanced_kmeans(features: Tensor, num_experts: int, seed: int) -> Tensor:
    """Cluster L2-normalised rows into clusters of exactly equal size.

    Args:
        features: ``(d_ff, p)``; a row of zeros (a neuron that never fires) stays at the origin.
        num_experts: Number of clusters; divides ``d_ff``.
        seed: Of the initial centres.

    Returns:
        Cluster of each row, ``(d_ff,)`` int64 on the CPU.
    """
    if num_experts == 1:
        return torch.zeros(features.shape[0], dtype=torch.int64)
    size = features.shape[0] // num_experts
    rows = F.normalize(features.detach().float().cpu(), dim=1).numpy()
    kmeans = KMeansConstrained(num_experts, size_min=size, size_max=size, n_init=1, random_state=seed)
    # silent neurons are equally far from all centres; one thread rounds, and so breaks such ties, the same way anywhere
    with threadpool_limits(1):
        return torch.from_numpy(kmeans.fit_predict(rows).astype("int64"))


class ActivationProfile:
    """Which tokens each neuron fires for, projected at random so that it fits in memory.

    The 0/1 firing matrix ``(tokens, d_ff)`` is multiplied by a matrix of random signs ``(tokens, p)``; inner products
    between neurons survive (Achlioptas, 2003). Signs belong to a sample's place in the data, and sums of signs are
    integers, so the profile is the same to the bit however samples are batched or spread over processes.

    Args:
        d_ff: Number of neurons.
        dim: ``p``, the dimensions kept.
    """

    def __init__(self, d_ff: int, dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(d_ff, dim, device=device)  # integers; exact in float32 up to 2^24 tokens

    def add(self, activation: Tensor, signs: Tensor) -> None:
        """Add tokens: ``activation`` is ``(N, d_ff)`` after the activation function, ``signs`` ``(N, p)``."""
        self.sums += (activation > 0).to(signs.dtype).t() @ signs  # (d_ff, N) @ (N, p)


def sample_signs(sample: int, num_tokens: int, dim: int, seed: int) -> Tensor:
    """The random signs of one sample's tokens: ``(num_tokens, dim)`` of -1 and 1, a function of its arguments alone."""
    # torch's CPU generator looks at the low 32 bits of its seed only
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**32)
    return torch.randint(0, 2, (num_tokens, dim), generator=generator).mul_(2).sub_(1).float()
