"""Partition of a weighted graph into parts of exactly equal size, by METIS where it is installed."""

import functools
import importlib.util
import warnings

import numpy as np
import torch
from torch import Tensor

from d2dmoe_pl.moe.splitting._balanced_kmeans import balanced_kmeans

MAX_TOTAL = 2**30  # of edge weights: METIS may have been built with 32-bit integers


def balanced_partition(weight: Tensor, num_parts: int, seed: int) -> Tensor:
    """Parts of equal size that keep as much edge weight inside as they can.

    METIS partitions the graph, to within a few per cent of equal sizes, and :func:`balance` does the rest. Without
    METIS, which is said once, the rows of ``weight`` are grouped by balanced k-means: nodes then lie together that
    have the same neighbours.

    Args:
        weight: Of each edge, symmetric, not negative, ``(n, n)``; the diagonal does not count.
        num_parts: Divides ``n``.
        seed: Of METIS or k-means.

    Returns:
        Part of each node, ``(n,)`` int64 on the CPU.
    """
    if not has_metis():
        return balanced_kmeans(weight, num_parts, seed)
    graph = weight.detach().cpu().double().numpy().copy()
    np.fill_diagonal(graph, 0)
    return torch.from_numpy(balance(graph, metis(graph, num_parts, seed), num_parts))


def kept_share(weight: Tensor, part: Tensor) -> float:
    """Share of all edge weight, ``(n, n)``, that lies between nodes of the same part, ``(n,)``; 1 without edges."""
    edges = weight.detach().cpu().double().fill_diagonal_(0)
    total = edges.sum().item()
    return edges[part[:, None] == part[None]].sum().item() / total if total else 1.0


@functools.cache
def has_metis() -> bool:
    """Whether pymetis is installed; said once if it is not."""
    found = importlib.util.find_spec("pymetis") is not None
    if not found:
        warnings.warn(
            "split coactivation: pymetis is not installed, so the co-activation graph is split by balanced k-means of "
            "its rows instead; pip install pymetis",
            stacklevel=2,
        )
    return found


def metis(graph: np.ndarray, num_parts: int, seed: int) -> np.ndarray:
    """METIS' recursive bisection (Karypis and Kumar, 1998) of ``(n, n)`` edge weights: the part of each node, ``(n,)``.

    Its k-way partition is the worse one on graphs as dense as these: of a sparse ViT on digits it kept 16% of the
    weight inside 32 parts, bisection 24%.
    """
    import pymetis  # noqa: PLC0415 (optional)

    integers = np.floor(graph * min(1.0, MAX_TOTAL / max(1.0, graph.sum()))).astype(np.int64)
    rows, columns = np.nonzero(integers)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(graph)))])
    kind = pymetis.zero_copy_dtype()
    adjacency = pymetis.CSRAdjacency(starts.astype(kind), columns.astype(kind))
    options = pymetis.Options(seed=seed)
    weights = integers[rows, columns].astype(kind)
    found = pymetis.part_graph(num_parts, adjacency, eweights=weights, recursive=True, options=options)
    return np.asarray(found.vertex_part, dtype=np.int64)


def balance(graph: np.ndarray, part: np.ndarray, num_parts: int) -> np.ndarray:
    """Move nodes from parts that are too large to parts that are too small, always the one that costs least.

    Args:
        graph: Edge weights, ``(n, n)``, with zeros on the diagonal.
        part: Of each node, ``(n,)``.
        num_parts: Divides ``n``.

    Returns:
        Part of each node, ``(n,)``, every part ``n / num_parts`` times.
    """
    part, size = part.copy(), len(part) // num_parts
    counts = np.bincount(part, minlength=num_parts)  # (parts,)
    attachment = graph @ np.eye(num_parts)[part]  # (n, parts): edge weight of each node to each part
    nodes = np.arange(len(part))
    while counts.max() > size:
        gain = attachment - attachment[nodes, part][:, None]  # (n, parts)
        gain[counts[part] <= size] = -np.inf
        gain[:, counts >= size] = -np.inf
        node, target = np.unravel_index(gain.argmax(), gain.shape)
        source = part[node]
        part[node] = target
        counts[source] -= 1
        counts[target] += 1
        attachment[:, source] -= graph[:, node]
        attachment[:, target] += graph[:, node]
    return part
