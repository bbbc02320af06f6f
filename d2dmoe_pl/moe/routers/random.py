"""Random experts: the baseline that every other router must beat."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2dmoe_pl.moe.experts import Experts
from d2dmoe_pl.moe.router import Router, RouterConfig

FREQUENCIES = (50.0, 150.0)  # so many periods that tokens a few per cent apart are scored independently


class RandomRouter(Router):
    """Scores that look random but belong to the token, so that a run can be repeated, in batches of any size.

    The token's direction is projected to one number, and each expert has a wave of its own over that number.
    """

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(d_model))
        self.register_buffer("frequency", torch.empty(num_experts).uniform_(*FREQUENCIES))
        self.register_buffer("phase", 2 * torch.pi * torch.rand(num_experts))

    def forward(self, tokens: Tensor) -> Tensor:
        place = F.normalize(tokens, dim=-1) @ self.projection.unsqueeze(1)  # (N, 1)
        return 1 + (place * self.frequency + self.phase).sin()  # (N, E)

    def flops(self) -> int:
        return 2 * self.projection.numel()


def random(experts: Experts, config: RouterConfig) -> RandomRouter:
    """See :mod:`d2dmoe_pl.moe.routers`."""
    return RandomRouter(experts.d_model, experts.num_experts)
