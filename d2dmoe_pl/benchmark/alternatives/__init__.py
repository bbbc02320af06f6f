"""Other ways to run the experts that a mask selects, one file each, as in :mod:`d2dmoe_pl.moe.execution`.

They are here to be compared with; models do not run on them.
"""

from d2dmoe_pl.moe.execution import Backend
from d2dmoe_pl.plugins import Plugins

ALTERNATIVES: Plugins[Backend] = Plugins(
    "d2dmoe_pl.benchmark.alternatives", "BACKEND", "a function (experts, tokens, mask) that gives the output", callable
)

__all__ = ["ALTERNATIVES"]
