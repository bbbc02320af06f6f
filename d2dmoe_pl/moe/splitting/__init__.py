"""Ways to split neurons into experts, one file each, whose ``SPLIT`` is an instance of a :class:`Split`.

A split gives every neuron an expert, and every expert equally many; it may go by the neurons' weights, or by what is
gathered of their activations on real data.
"""

from d2dmoe_pl.moe.splitting._firing_statistics import CountedTokens, fired
from d2dmoe_pl.moe.splitting._split import SPLITS, Split, register_split

__all__ = ["SPLITS", "CountedTokens", "Split", "fired", "register_split"]
