"""A random expert for each token id."""

from d2dmoe_pl.moebert.routing import HashRouting


class RandomHash(HashRouting):
    """The table is drawn once, by the seed, and stays."""


ROUTING = RandomHash
