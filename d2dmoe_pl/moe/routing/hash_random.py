"""A random expert for each token id."""

from d2dmoe_pl.moe.chosen import RoutingSizes
from d2dmoe_pl.moe.hash_table import HashRouting, random_table


def hash_random(sizes: RoutingSizes) -> HashRouting:
    """See :mod:`d2dmoe_pl.moe.routing`."""
    return HashRouting(random_table(sizes.vocabulary_size, sizes.num_experts, sizes.seed))


hash_random.needs_ids, hash_random.needs_counts = True, False
