"""One LightningModule a phase, one file each. A phase starts from the artifact of another through ``init_from``.

The phases that are defined in files here, but for those whose name begins with ``_``, are names of this package.
"""

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from d2dmoe_pl.phases._optimized_phase import OptimizedPhase
from d2dmoe_pl.phases._phase import Phase


def _defined_here() -> dict[str, type[Phase]]:
    found = {"OptimizedPhase": OptimizedPhase, "Phase": Phase}
    for file in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        if not file.name.startswith(f"{__name__}._"):
            members = inspect.getmembers(importlib.import_module(file.name), inspect.isclass)
            found |= {
                name: value for name, value in members if value.__module__ == file.name and issubclass(value, Phase)
            }
    return found


globals().update(_defined_here())

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
