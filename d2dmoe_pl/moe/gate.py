"""The gate of a MoE layer: a gating rule, found by name, at a ``tau``."""

from dataclasses import dataclass

from torch import Tensor, nn

from d2dmoe_pl import plugins
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe import gating


def check_tau(tau: float, argument: str = "tau") -> None:
    """Raise ``ConfigError`` unless ``tau`` lies in [0, 1]."""
    check(0.0 <= tau <= 1.0, f"{argument}={tau}: must lie in [0, 1] (1 runs every expert, the dense layer)")


@dataclass(frozen=True)
class GateConfig:
    """Which experts run.

    Attributes:
        rule: Name of a file in ``moe/gating``: ``dynk_max``, ``dynk_cumulative`` or ``topk``.
        tau: In [0, 1]; larger runs more experts, 1 runs all.
        k: Of ``topk``, how many experts each token runs, instead of the share ``tau``.

    Raises:
        ConfigError: For an unknown rule, a ``tau`` outside [0, 1], a ``k`` below 1, or one for another rule.
    """

    rule: str = "dynk_max"
    tau: float = 1.0
    k: int | None = None

    def __post_init__(self) -> None:
        plugins.find(gating, self.rule, "gate")
        check_tau(self.tau)
        if self.k is not None:
            check(self.rule == "topk", f"k={self.k}: allowed only with gate topk, not {self.rule}")
            check(self.k >= 1, f"k={self.k}: must be at least 1, the number of experts that each token runs")

    def tau_among(self, num_experts: int) -> float:
        """``tau`` for a layer with ``num_experts`` experts."""
        return self.tau if self.k is None else self.k / num_experts


class Gate(nn.Module):
    """Scores ``(N, E)`` to a boolean mask ``(N, E)``. Forward hooks on it see every routing decision."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        self._rule = plugins.find(gating, config.rule, "gate")

    def forward(self, scores: Tensor) -> Tensor:
        return self._rule(scores, self.config.tau_among(scores.shape[-1]))

    def extra_repr(self) -> str:
        how_many = f"tau={self.config.tau}" if self.config.k is None else f"k={self.config.k}"
        return f"rule={self.config.rule}, {how_many}"
