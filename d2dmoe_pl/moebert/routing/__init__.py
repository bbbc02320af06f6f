"""Ways to choose one expert a token, one file each, whose ``ROUTING`` is a subclass of :class:`Routing`.

The contract, held by one test over all routings:

- every token gets one expert, the same whether its sentence comes alone or in a padded batch;
- forward hooks on the module see every decision.
"""

from d2dmoe_pl.moebert.routing._decision import Decision, load_balancing_loss, most_probable
from d2dmoe_pl.moebert.routing._hash_table import HashRouting, balanced_table, check_table, random_table
from d2dmoe_pl.moebert.routing._routing import ROUTINGS, Routing, RoutingSizes, register_routing

__all__ = [
    "ROUTINGS",
    "Decision",
    "HashRouting",
    "Routing",
    "RoutingSizes",
    "balanced_table",
    "check_table",
    "load_balancing_loss",
    "most_probable",
    "random_table",
    "register_routing",
]
