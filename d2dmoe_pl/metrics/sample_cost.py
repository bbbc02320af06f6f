"""What each sample of a batch costs: the experts that its tokens run, and FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2dmoe_pl.metrics.flops import pair_flops
from d2dmoe_pl.moe.layer import ExpertLayer


@dataclass(frozen=True)
class SampleCost:
    """The cost of each of ``B`` samples.

    Attributes:
        experts_percent: Executed share of all (token, expert) pairs, over layers, percent.
        flops: Of the whole model; a multiply-add is 2.
    """

    experts_percent: list[float]
    flops: list[int]


def pairs_by_sample(mask: Tensor, tokens: Sequence[int]) -> list[int]:
    """How many (token, expert) pairs of each sample ran in a layer.

    Args:
        mask: Boolean ``(N, E)``; the tokens of one sample after another.
        tokens: Of each sample; they sum to ``N``.
    """
    sample = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens))  # (N,)
    pairs = mask.sum(dim=1).cpu()  # (N,)
    return torch.zeros(len(tokens), dtype=pairs.dtype).index_add_(0, sample, pairs).tolist()


def sample_cost(
    layers: Sequence[ExpertLayer],
    masks: Sequence[Tensor],
    tokens: Sequence[Sequence[int]],
    flops_outside: Sequence[int],
) -> SampleCost:
    """The cost of each sample of a batch; summed over samples, what a sweep reports.

    Args:
        layers: Those with experts.
        masks: What each of them decided, boolean ``(N, E)``; a layer of a model without a gate runs all, and has none.
        tokens: By layer, those of each sample, without padding.
        flops_outside: Of each sample, outside the layers with experts.
    """
    flops, ran, possible = list(flops_outside), [0] * len(flops_outside), [0] * len(flops_outside)
    for layer, mask, numbers in zip(layers, masks, tokens, strict=True):
        num_experts = layer.sizes.num_experts
        for i, pairs in enumerate(pairs_by_sample(mask, numbers)):
            flops[i] += pairs * pair_flops(layer.sizes) + layer.flops_beside_experts(numbers[i], 1)
            ran[i] += pairs
            possible[i] += numbers[i] * num_experts
    shares = [100 * some / every if every else 100.0 for some, every in zip(ran, possible, strict=True)]
    return SampleCost(shares, flops)
