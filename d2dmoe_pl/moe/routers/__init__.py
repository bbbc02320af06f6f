"""Ways to score experts, one file each, whose ``ROUTER`` is a subclass of :class:`Router`.

The contract, held by one test over all routers:

- scores ``(N, E)`` are not negative, and a token's row depends on that token alone;
- ``flops()`` is what torch counts on the products that are run for one token;
- an artifact keeps the router: what it goes by is in its parameters, its buffers or the experts' weights;
- a router with parameters has a ``loss`` that training lowers.
"""

from d2dmoe_pl.moe.routers._router import ROUTERS, Router, RouterConfig, make_router, register_router
from d2dmoe_pl.moe.routers._targets import (
    Target,
    activation_sums,
    gram_matrices,
    output_norms,
    positive_sums,
    relative_norms,
    router_targets,
    share_of_largest,
)
from d2dmoe_pl.moe.routers._trial import try_router

__all__ = [
    "ROUTERS",
    "Router",
    "RouterConfig",
    "Target",
    "activation_sums",
    "gram_matrices",
    "make_router",
    "output_norms",
    "positive_sums",
    "register_router",
    "relative_norms",
    "router_targets",
    "share_of_largest",
    "try_router",
]
