"""Choices among experts that are made beforehand, so that exactly a given share of them runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.layer import MoELayer


def random_mask(tokens: int, num_experts: int, share: float, device: torch.device) -> Tensor:
    """A boolean mask ``(N, E)``, a ``share`` of it true (at least one pair, rounded to whole ones), drawn at random."""
    pairs = max(1, round(share * tokens * num_experts))
    mask = torch.zeros(tokens * num_experts, dtype=torch.bool)
    mask[torch.randperm(len(mask))[:pairs]] = True
    return mask.view(tokens, num_experts).to(device)  # (N, E)


class PresetGate(nn.Module):
    """Gives the same mask whatever the scores.

    Args:
        mask: Boolean ``(N, E)``.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, scores: Tensor) -> Tensor:
        return self.mask


@contextmanager
def preset_masks(layers: Mapping[str, MoELayer], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the body with these masks in these layers, without routers, then put routers and gates back.

    Args:
        layers: MoE layers by name.
        masks: Boolean ``(N, E)`` of each.
    """
    before = {name: (layer.router, layer.gate) for name, layer in layers.items()}
    layer: Any  # neither a preset mask nor Identity is a gate or router, but both are called alike
    for name, layer in layers.items():
        layer.router, layer.gate = nn.Identity(), PresetGate(masks[name])
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.router, layer.gate = before[name]
