"""Balanced k-means."""

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
    size = features.shape[0] // num_experts
    if num_experts == 1 or size == 1:  # nothing to choose
        return torch.arange(features.shape[0]) // size
    rows = F.normalize(features.detach().float().cpu(), dim=1).numpy()
    kmeans = KMeansConstrained(num_experts, size_min=size, size_max=size, n_init=1, random_state=seed)
    # silent neurons are equally far from all centres; one thread rounds, and so breaks such ties, the same way anywhere
    with threadpool_limits(1):
        return torch.from_numpy(kmeans.fit_predict(rows).astype("int64"))
