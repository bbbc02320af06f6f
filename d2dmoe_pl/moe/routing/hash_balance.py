"""Token ids dealt out so that experts get about equally many tokens of the training data."""

from d2dmoe_pl.moe.chosen import RoutingSizes
from d2dmoe_pl.moe.hash_table import HashRouting, random_table


def hash_balance(sizes: RoutingSizes) -> HashRouting:
    """See :mod:`d2dmoe_pl.moe.routing`. Random until :func:`d2dmoe_pl.moe.moebert.set_hash_table_`."""
    return HashRouting(random_table(sizes.vocabulary_size, sizes.num_experts, sizes.seed))


hash_balance.needs_ids = hash_balance.needs_counts = True
