"""What a sweep sets a model to: a tau, a number of experts, a budget; or nothing, where routing has no setting."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.budgets.budget_path import budget_path, rounded_up, set_budget_
from d2dmoe_pl.moe.conversion import temporary_gate
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.notices import notice

BUDGET = "budget"


@dataclass(frozen=True)
class SweepSetting:
    """One point of a sweep.

    Attributes:
        swept: What is set: ``tau``, ``k`` or ``budget``.
        value: Of it; a budget is a share of the dense FFNs' FLOPs.
        rule: Gating rule of a ``tau`` or a ``k``; a budget has its own.
    """

    swept: str
    value: float
    rule: str = "dynk_max"

    @property
    def gate(self) -> GateConfig:
        """Of every layer, for a ``tau`` or a ``k``."""
        return GateConfig(self.rule, k=int(self.value)) if self.swept == "k" else GateConfig(self.rule, self.value)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Have the model so in the body, and as it was afterwards."""
        if self.swept != BUDGET:
            with temporary_gate(model, self.gate):
                yield
            return
        path = budget_path(model)
        assert path is not None  # reachable() has said so
        with temporary_gate(model, GateConfig(path.rule)):
            set_budget_(model, ffn_flops=self.value)
            yield


def reachable(settings: Sequence[SweepSetting], model: nn.Module) -> list[SweepSetting]:
    """Those of the settings that the model can be set to; budgets below its least are left out, which is said.

    Raises:
        ConfigError: For budgets of a model that knows none, or if it reaches none of them.
    """
    if not any(setting.swept == BUDGET for setting in settings):
        return list(settings)
    path = budget_path(model)
    check_budgets(path is not None)
    assert path is not None
    least = path.points[-1].ffn_flops
    found = [setting for setting in settings if setting.value >= least]
    missed = [f"{setting.value:g}" for setting in settings if setting.value < least]
    said = f"budgets {', '.join(missed)}: less than this model can do, {rounded_up(least)} of the dense FFNs' FLOPs"
    check(bool(found), said)
    if missed:
        notice(f"Left out are {said}.")
    return found


def check_budgets(is_known: bool) -> None:
    """Raise ``ConfigError`` unless budgets of a model are known, or will be."""
    check(is_known, "budgets: the model knows none; the sweep must be of BudgetCalibration, or have taus")
