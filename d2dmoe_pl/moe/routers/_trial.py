"""Routers from outside of the package, held to what scores have to be, on a few random tokens."""

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.evaluation_mode import evaluating
from d2dmoe_pl.moe.routers._router import ROUTERS, Router
from d2dmoe_pl.sharded_tensors import is_sharded

TOKENS = 16


@torch.no_grad()
def try_router(router: nn.Module, d_model: int, like: Tensor, may_be_negative: bool) -> None:
    """Raise ``ConfigError`` if a router that is not the package's own scores with what no gate can go by.

    Args:
        router: Of any kind. One that cannot score these tokens is told when a model calls it.
        d_model: The width of tokens.
        like: Of whose type and on whose device they are.
        may_be_negative: Whether the gate goes by the order of scores alone.
    """
    if not isinstance(router, Router) or ROUTERS.is_own(router.config.kind):  # where masks are given, nothing is scored
        return
    if like.is_meta or is_sharded(router):
        return
    dtype = like.dtype if like.is_floating_point() else torch.float32
    tokens = torch.randn(TOKENS, d_model, generator=torch.Generator().manual_seed(0), device="cpu")
    with torch.random.fork_rng(devices=[]), evaluating(router):
        try:
            scores = router(tokens.to(like.device, dtype))
            lowest, has_nan = float(scores.min()), bool(scores.isnan().any())
        except Exception:  # whatever it raises, or gives: it may need a kernel that is for another device
            return
    check(not has_nan, f"router={router.config.kind!r}: scored random tokens NaN; must be numbers")
    check(
        may_be_negative or lowest >= 0,
        f"router={router.config.kind!r}: scored a random token {lowest:.2g}; must not be negative, but for rules that "
        "take k",
    )
