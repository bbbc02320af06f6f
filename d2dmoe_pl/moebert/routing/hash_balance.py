"""Token ids dealt out so that experts get about equally many tokens of the training data."""

from d2dmoe_pl.moebert.routing import HashRouting


class BalancedHash(HashRouting):
    """The table is a random one until :func:`d2dmoe_pl.moebert.conversion.set_hash_table_` gives it a balanced one."""

    needs_counts = True


ROUTING = BalancedHash
