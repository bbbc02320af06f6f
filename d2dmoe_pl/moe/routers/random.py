"""Random experts: the baseline that every other router must beat."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.routers import Router, RouterConfig

FREQUENCIES = (50.0, 150.0)  # so many periods that tokens a few per cent apart are scored independently


class RandomRouter(Router):
    """Scores that look random but belong to the token, so that a run can be repeated, in batches of any size.

    The token's direction is projected to one number, and each expert has a wave of its own over that number.
    """

    projection: Tensor
    frequency: Tensor
    phase: Tensor

    def __init__(self, experts: Experts, config: RouterConfig) -> None:
        super().__init__(experts, config)
        self.register_buffer("projection", torch.randn(experts.d_model))
        self.register_buffer("frequency", torch.empty(experts.num_experts).uniform_(*FREQUENCIES))
        self.register_buffer("phase", 2 * torch.pi * torch.rand(experts.num_experts))

    def forward(self, tokens: Tensor) -> Tensor:
        place = F.normalize(tokens, dim=-1) @ self.projection.unsqueeze(1)  # (N, 1)
        return 1 + (place * self.frequency + self.phase).sin()  # (N, E)

    def flops(self) -> int:
        return 2 * self.projection.numel()


ROUTER = RandomRouter
