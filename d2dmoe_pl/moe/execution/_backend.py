"""What every way to run experts is, and how one is found by name."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from d2dmoe_pl.plugins import Plugins

if TYPE_CHECKING:
    from d2dmoe_pl.moe.experts.experts import Experts


class Backend(Protocol):
    """A way to run the experts that a mask selects. See :mod:`d2dmoe_pl.moe.execution` for what it has to compute."""

    def __call__(
        self,
        experts: Experts,
        tokens: Tensor,
        mask: Tensor,
        cutoff: Tensor | None = None,
        gate_cutoff: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``(N, d)`` and a boolean mask ``(N, E)`` to ``(N, d_out)``.

        The last arguments, the magnitudes below which activations, and neurons by their gates, are left out, may be
        missing: such a backend cannot run layers that have these cutoffs.
        """


BACKENDS: Plugins[Backend] = Plugins(
    "d2dmoe_pl.moe.execution", "BACKEND", "a function (experts, tokens, mask) that gives the output", callable
)


def taken_cutoffs(backend: Backend) -> frozenset[str]:
    """By which arguments ``backend`` can leave small values out."""
    return frozenset(inspect.signature(backend).parameters) & {"cutoff", "gate_cutoff"}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend`` known as ``name``, wherever a backend can be named; for this process.

    Args:
        name: What ``set_backend_``, the benchmark and artifacts call it.
        backend: Runs the experts that a mask selects.

    Raises:
        ConfigError: If the name is taken.

    Example:
        >>> from d2dmoe_pl.moe.execution import BACKENDS, register_backend
        >>> def all_and_mask(experts, tokens, mask):
        ...     return experts.combine(experts.hidden(tokens) * mask.unsqueeze(-1))
        >>> register_backend("all_and_mask", all_and_mask)
        >>> BACKENDS.find("all_and_mask", "backend") is all_and_mask
        True
    """
    BACKENDS.register(name, backend)
