"""Ways to score experts, one file each: ``router(experts, config) -> module``.

``experts`` is the layer's :class:`d2dmoe_pl.moe.experts.Experts`, ``config`` a
:class:`d2dmoe_pl.moe.router.RouterConfig`, the module a :class:`d2dmoe_pl.moe.router.Router`. The contract, held by one
test over this package:

- scores ``(N, E)`` are not negative, and a token's row depends on that token alone;
- ``flops()`` is what torch counts on the products that are run for one token;
- an artifact keeps the router: what it goes by is in its parameters, its buffers or the experts' weights;
- a router with parameters has a ``loss`` that training lowers.
"""
