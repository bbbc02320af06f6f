"""Experts whose weights look like the token: MoEfication (arXiv 2110.01786), section 3.2. Nothing is trained."""

from torch import Tensor
from torch.nn import functional as F

from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.routers import Router, RouterConfig


class SimilarityRouter(Router):
    """One more than the cosine of the token and the mean of the expert's weight columns."""

    mean: Tensor

    def __init__(self, experts: Experts, config: RouterConfig) -> None:
        super().__init__(experts, config)
        self.register_buffer("mean", F.normalize(experts.input_weight.detach().mean(dim=1), dim=-1))  # (E, d)

    def forward(self, tokens: Tensor) -> Tensor:
        return (1 + F.linear(F.normalize(tokens, dim=-1), self.mean)).clamp(min=0)

    def flops(self) -> int:
        return 2 * self.mean.numel()


ROUTER = SimilarityRouter
