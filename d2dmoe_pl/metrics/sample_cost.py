"""What each sample of a batch costs: the experts that its tokens run, and FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2dmoe_pl.metrics.flops import pair_flops
from d2dmoe_pl.moe.expert_layer import ExpertLayer


@dataclass(frozen=True)
class SampleCost:
    """The cost of each of ``B`` samples.

    Attributes:
        experts_percent: Executed share of all (token, expert) pairs, over layers, percent.
        flops: Of the whole model; a multiply-add is 2.
    """

    experts_percent: list[float]
    flops: list[int]


def summed_by_sample(values: Tensor, tokens: Sequence[int]) -> list[float]:
    """The sum over the tokens of each sample.

    Args:
        values: ``(N,)``; the tokens of one sample after another.
        tokens: Of each sample; they sum to ``N``.
    """
    sample = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens))  # (N,)
    return torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, sample, values.double().cpu()).tolist()


def sample_cost(
    layers: Sequence[ExpertLayer],
    masks: Sequence[Tensor],
    works: Sequence[Tensor],
    tokens: Sequence[Sequence[int]],
    flops_outside: Sequence[int],
) -> SampleCost:
    """The cost of each sample of a batch; summed over samples, what a sweep reports.

    Args:
        layers: Those with experts.
        masks: What each of them decided, boolean ``(N, E)``; a layer of a model without a gate runs all, and has none.
        works: What each token has each of them do, in executed pairs, ``(N,)``; see :meth:`ExpertLayer.watch_work`.
        tokens: By layer, those of each sample, without padding.
        flops_outside: Of each sample, outside the layers with experts.
    """
    flops, ran, possible = list(flops_outside), [0] * len(flops_outside), [0] * len(flops_outside)
    for layer, mask, work, numbers in zip(layers, masks, works, tokens, strict=True):
        for i, done in enumerate(summed_by_sample(work, numbers)):
            flops[i] += round(done * pair_flops(layer.sizes)) + layer.flops_beside_experts(numbers[i], 1)
        for i, pairs in enumerate(summed_by_sample(mask.sum(dim=1), numbers)):
            ran[i] += int(pairs)
            possible[i] += numbers[i] * layer.sizes.num_experts
    shares = [100 * some / every if every else 100.0 for some, every in zip(ran, possible, strict=True)]
    return SampleCost(shares, flops)
