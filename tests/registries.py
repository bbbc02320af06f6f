"""All registries of plug-ins."""

from d2dmoe_pl.adapters import ADAPTERS
from d2dmoe_pl.moe.execution import BACKENDS
from d2dmoe_pl.moe.gating import GATING_RULES
from d2dmoe_pl.moe.routers import ROUTERS
from d2dmoe_pl.moe.splitting import SPLITS
from d2dmoe_pl.moebert.routing import ROUTINGS

REGISTRIES = [GATING_RULES, ROUTERS, SPLITS, ROUTINGS, BACKENDS, ADAPTERS]
