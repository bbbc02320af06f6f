"""Settings that go with scores which change, so that layers do as much as they did at first."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS


def moved_tau(tau: float, first: Sequence[float], now: Sequence[float]) -> float:
    """The setting at which a layer does as much work now as it did at ``tau`` at first; 1 stays 1, the dense layer.

    Args:
        tau: Of then.
        first: The share of all work that was done at each of ``FINE_TAUS``, rising.
        now: The same, of scores as they are.

    Example:
        >>> from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS
        >>> from d2dmoe_pl.moe.budgets.held_work import moved_tau
        >>> now = [tau**0.5 for tau in FINE_TAUS]  # more is done than at first
        >>> round(moved_tau(0.5, FINE_TAUS, now), 3), moved_tau(1.0, FINE_TAUS, now)
        (0.25, 1.0)
    """
    if tau >= 1:
        return tau
    work = np.interp(tau, FINE_TAUS, np.maximum.accumulate(first))
    return float(np.interp(work, np.maximum.accumulate(now), FINE_TAUS))


@dataclass
class HeldWork:
    """What layers did at first, and what they do now, at each of ``FINE_TAUS``.

    Attributes:
        first: Of each layer, the share of all work, rising.
        now: The same, by scores as they are.
    """

    first: list[list[float]]
    now: list[list[float]]

    def taus(self, taus: Sequence[float]) -> tuple[float, ...]:
        """The settings of all layers at which they do as much now as they did at ``taus`` at first."""
        return tuple(map(moved_tau, taus, self.first, self.now))
