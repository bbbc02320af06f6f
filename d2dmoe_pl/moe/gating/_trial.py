"""Gating rules from outside of the package, held to what a rule has to do, on a few random scores."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.errors import check

TAUS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS, EXPERTS = 16, 8


@cache
def try_rule(name: str, rule: Callable[..., Any]) -> None:
    """Raise ``ConfigError`` if a gating rule does not hold what is expected of it; once for each rule.

    Args:
        name: What the rule is called.
        rule: It. One that cannot be called with these scores, or gives no mask of them, is told when a model calls it.
    """
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0), device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            masks = [rule(scores, torch.tensor(tau, dtype=torch.float64, device="cpu")) for tau in TAUS]
            alone = [rule(scores[:1], torch.tensor(tau, dtype=torch.float64, device="cpu")) for tau in TAUS]
        except Exception:  # whatever it raises: it may be for another number of experts, or another device
            return
    if not all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in (*masks, *alone)):
        return
    if any(mask.shape != scores.shape for mask in masks) or any(mask.shape != (1, EXPERTS) for mask in alone):
        return
    fewest, most = masks[0], masks[-1]
    ran = f"ran {int(most.sum())} of {most.numel()}"
    check(bool(most.all()), f"rule={name!r}: {ran} random scores at tau=1; must run all, which is the dense layer")
    check(
        bool(fewest.any(dim=1).all()), f"rule={name!r}: left a token without an expert at tau=0; must run one at least"
    )
    check(
        not bool(fewest.all()),
        f"rule={name!r}: ran all random scores at tau=0 as at tau=1; must be a function (scores, tau) in this order, "
        "which goes by both",
    )
    check(
        all(bool((more >= fewer).all()) for fewer, more in pairwise(masks)),
        f"rule={name!r}: left out an expert at a larger tau that ran at a smaller one; must never",
    )
    check(
        all(bool((one[0] == mask[0]).all()) for one, mask in zip(alone, masks, strict=True)),
        f"rule={name!r}: decided otherwise for a token alone than beside others; must go by its own scores",
    )
