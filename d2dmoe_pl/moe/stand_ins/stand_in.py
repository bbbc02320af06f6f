"""A map of low rank that predicts what a token's skipped experts would have given."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.typed_settings import check_types_


@dataclass(frozen=True)
class StandInConfig:
    """The stand-in of a MoE layer.

    Attributes:
        rank: Of its map; 16 costs 1% of an FFN of 384 x 1,536. 0 is no stand-in.

    Raises:
        ConfigError: If ``rank`` is negative.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        check_types_(self)
        check(self.rank >= 0, f"rank={self.rank}: must not be negative; 0 is no stand-in")

    def check_fits(self, experts: Experts, name: str) -> None:
        """Raise ``ConfigError`` if the rank is larger than the layer ``name`` is wide."""
        widest = min(experts.d_model, experts.d_out)
        check(self.rank <= widest, f"rank={self.rank}: must be at most {widest}, the width of {name}")


def skipped_share(scores: Tensor, mask: Tensor) -> Tensor:
    """The share of all scores that experts have which do not run: 0 where all run.

    Args:
        scores: ``(N, E)``, not negative.
        mask: Boolean ``(N, E)``, true for experts that run.

    Returns:
        ``(N, 1)`` float32.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.stand_ins.stand_in import skipped_share
        >>> skipped_share(torch.tensor([[4.0, 1.0, 3.0]]), torch.tensor([[True, False, True]]))
        tensor([[0.1250]])
    """
    scores = scores.float()
    skipped = scores.masked_fill(mask, 0.0).sum(dim=1, keepdim=True)  # (N, 1)
    return skipped / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


class StandIn(nn.Module):
    """``a(x) (up (down x) + mean)``, where ``a(x)`` is the share of a token's predicted norms that is skipped.

    So it fades as fewer experts are skipped, and is exactly zero where none is. Freshly made, it is zero everywhere;
    :func:`d2dmoe_pl.moe.stand_ins.fitting.fit_stand_ins_` fits it.

    Args:
        experts: Of the layer, to take sizes from.
        config: Its rank, ``R``, at least 1.

    Attributes:
        down: ``(R, d_model)``.
        up: ``(R + 1, d_out)``; the last row is the mean.
    """

    def __init__(self, experts: Experts, config: StandInConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Parameter(torch.zeros(config.rank, experts.d_model))
        self.up = nn.Parameter(torch.zeros(config.rank + 1, experts.d_out))

    def forward(self, tokens: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """Tokens ``(N, d_model)``, their scores and mask ``(N, E)``, to ``(N, d_out)``; scores get no gradient."""
        share = skipped_share(scores.detach(), mask).to(tokens.dtype)  # (N, 1)
        hidden = torch.cat([nn.functional.linear(tokens, self.down) * share, share], dim=1)  # (N, R + 1)
        return hidden @ self.up

    def flops(self) -> int:
        """FLOPs for one token; a multiply-add is 2."""
        return 2 * (self.down.numel() + self.up.numel())

    def extra_repr(self) -> str:
        return f"rank={self.config.rank}"


def make_stand_in(experts: Experts, config: StandInConfig) -> StandIn:
    """A new stand-in for ``experts``, where they are and of their type."""
    return StandIn(experts, config).to(experts.up_weight.device, experts.up_weight.dtype)
