"""The way down from the dense model, point by point, and the budgets that it answers."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating._gate import GATING_RULES, plain_number, takes_k

ATTRIBUTE = "d2dmoe_budget_path"  # of a model
COSTS = ("ffn_flops", "flops")


@dataclass(frozen=True)
class BudgetPoint:
    """A setting of all layers, and what it costs and gives.

    Attributes:
        taus: Of each layer, in the path's order.
        ffn_flops: FLOPs of the FFNs, share of the dense ones'; routers and stand-ins in, padding out.
        flops: FLOPs of the whole model, share of the dense one's.
        divergence: From the predictions with every expert on, mean over samples.
        score: The task's main metric as people read it, in percent if it is a share.
    """

    taus: tuple[float, ...]
    ffn_flops: float
    flops: float
    divergence: float
    score: float


@dataclass(frozen=True)
class BudgetPath:
    """Points from every expert on to the fewest, each cheaper than the one before.

    Attributes:
        layers: Names of the layers.
        rule: Gating rule of all.
        metric: Name of the task's main metric.
        in_percent: Whether its values are percentages.
        higher_is_better: Whether a larger value is better.
        samples: Of the validation split, that costs and scores are of.
        points: The first is the dense model.
        is_share_of_samples: Whether scores are the share of samples that are right; false where an earlier version,
            which did not tell, saved it.
    """

    layers: tuple[str, ...]
    rule: str
    metric: str
    in_percent: bool
    higher_is_better: bool
    samples: int
    points: tuple[BudgetPoint, ...]
    is_share_of_samples: bool = False

    @property
    def dense(self) -> BudgetPoint:
        """Every expert on."""
        return self.points[0]

    def standard_error(self, score: float) -> float | None:
        """How far a share of ``samples`` may be off, as ``score`` is read; None for other metrics."""
        if not self.is_share_of_samples:
            return None
        share = min(max(score / 100, 0.0), 1.0)
        return 100 * (share * (1 - share) / self.samples) ** 0.5

    def loss_of(self, point: BudgetPoint) -> float:
        """By how much a point's score is worse than with every expert on, in the metric's own unit."""
        sign = 1 if self.higher_is_better else -1
        return sign * (self.dense.score - point.score)

    def at_cost(self, cost: str, share: float) -> BudgetPoint:
        """The point that costs ``share``, between two of the path; the dense one for more than it costs.

        A rule that takes a ``k`` runs whole numbers of experts: what lies between costs as much as the dearer of the
        two, so that the cheaper one is taken.

        Args:
            cost: ``ffn_flops`` or ``flops``.
            share: Of the dense cost.

        Raises:
            ConfigError: If it is less than the path reaches.
        """
        least = getattr(self.points[-1], cost)
        check(
            share >= least,
            f"{cost}={share:g}: less than this model can do; must be at least {rounded_up(least)}, with the fewest "
            "experts on",
        )
        in_steps = costs_in_steps(self.rule)
        for above, below in pairwise(self.points):
            start, end = getattr(above, cost), getattr(below, cost)
            if share >= start:
                return above
            if share >= end:
                return below if in_steps else _between(above, below, (start - share) / (start - end))
        return self.points[-1]

    def at_drop(self, drop: float) -> BudgetPoint:
        """The cheapest point down to which no score is worse than the dense one's by more than ``drop``.

        Args:
            drop: In the metric's own unit, percentage points if it is a share; not negative.

        Raises:
            ConfigError: If it is negative.
        """
        check(drop >= 0, f"drop={drop:g}: must not be negative")
        found = self.dense
        for point in self.points:
            if not self.loss_of(point) <= drop:  # a NaN is no small loss
                break
            found = point
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain JSON; :func:`path_from_json` is the inverse."""
        return asdict(self)


def costs_in_steps(rule: str) -> bool:
    """Whether the cost of a layer jumps from one number of experts to the next as its ``tau`` falls."""
    return takes_k(GATING_RULES.find(rule, "rule"))


def path_from_json(made: dict[str, Any]) -> BudgetPath:
    """The inverse of :meth:`BudgetPath.as_json`."""
    points = tuple(BudgetPoint(**{**point, "taus": tuple(point["taus"])}) for point in made["points"])
    return BudgetPath(**{**made, "layers": tuple(made["layers"]), "points": points})


def falling(points: Sequence[BudgetPoint]) -> tuple[BudgetPoint, ...]:
    """The points of ``points`` that are cheaper than all before them, by both costs."""
    found: list[BudgetPoint] = []
    for point in points:
        if all(getattr(point, cost) < getattr(other, cost) for other in found[-1:] for cost in COSTS):
            found.append(point)
    return tuple(found)


def budget_path(model: nn.Module) -> BudgetPath | None:
    """What ``BudgetCalibration`` found for ``model``; None if it has not been through it."""
    path: BudgetPath | None = getattr(model, ATTRIBUTE, None)
    return path


def rounded_up(share: float) -> str:
    """The least share of four digits that is no less than ``share``, as messages name it.

    Example:
        >>> from d2dmoe_pl.moe.budgets.budget_path import rounded_up
        >>> rounded_up(0.12341), rounded_up(0.25)
        ('0.1235', '0.2500')
    """
    return f"{math.ceil(share * 1e4 - 1e-9) / 1e4:.4f}"


def set_budget_path_(model: nn.Module, path: BudgetPath | None) -> None:
    """Let ``model`` have ``path`` for budgets; None for none, as when it is trained on."""
    if path is None:
        if hasattr(model, ATTRIBUTE):
            delattr(model, ATTRIBUTE)
        return
    setattr(model, ATTRIBUTE, path)


def set_budget_(
    model: nn.Module, *, ffn_flops: float | None = None, flops: float | None = None, drop: float | None = None
) -> BudgetPoint:
    """Set ``tau`` of every MoE layer so that the model costs what is asked for; no retraining is needed.

    Args:
        model: As the phase ``BudgetCalibration`` left it.
        ffn_flops: Share of the dense FFNs' FLOPs, e.g. 0.1.
        flops: Share of the dense model's FLOPs, instead.
        drop: By how much the task's main metric may be worse than with every expert on, instead; percentage points
            if it is a share. As measured on the validation split.

    Returns:
        What this costs and gives on the validation split.

    Raises:
        ConfigError: If not exactly one of the three is given, it cannot be reached, or the model has no path of
            budgets, or not the layers that the path is of.

    Example:
        >>> import timm
        >>> from d2dmoe_pl import ExpertsConfig, GateConfig, RouterConfig
        >>> from d2dmoe_pl import add_routers_, convert_to_moe_, set_budget_, set_gate_
        >>> from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_
        >>> model = timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> add_routers_(model, RouterConfig(width=4))
        >>> set_gate_(model, GateConfig("dynk_max"))
        >>> points = (BudgetPoint((1.0,), 1.0, 1.0, 0.0, 90.0), BudgetPoint((0.0,), 0.2, 0.6, 0.4, 80.0))
        >>> path = BudgetPath(("blocks.0.mlp",), "dynk_max", "accuracy", True, True, samples=100, points=points)
        >>> set_budget_path_(model, path)  # BudgetCalibration measures such a path
        >>> set_budget_(model, ffn_flops=0.6).score
        85.0
        >>> model.blocks[0].mlp.gate
        Gate(rule=dynk_max, tau=0.5)
    """
    given = {"ffn_flops": ffn_flops, "flops": flops, "drop": drop}
    wanted = {name: value for name, value in given.items() if value is not None}
    check(len(wanted) == 1, f"budget: exactly one of {', '.join(given)} must be given")
    path = budget_path(model)
    check(
        path is not None, f"{type(model).__name__}: knows no budgets yet; run BudgetCalibration first, or use set_tau_"
    )
    assert path is not None
    ((name, given_value),) = wanted.items()
    value = plain_number(given_value, float)
    check(value is not None, f"{name}={given_value!r}: must be a number")
    assert value is not None
    is_share = name == "drop" or value <= max(1.0, getattr(path.dense, name))
    check(is_share, f"{name}={value:g}: must be at most 1, all that the dense model costs; 25% is 0.25")
    point = path.at_drop(value) if name == "drop" else path.at_cost(name, value)
    set_taus_(model, path, point.taus)
    return point


def set_taus_(model: nn.Module, path: BudgetPath, taus: Sequence[float]) -> None:
    """Set ``tau`` of each layer of a path.

    Raises:
        ConfigError: If the model has other layers than the path is of, or another rule.
    """
    layers = moe_layers(model)
    check(
        tuple(layers) == path.layers,
        f"{type(model).__name__}: has other MoE layers than those that BudgetCalibration saw; run it anew",
    )
    for name, layer in layers.items():
        rule = None if layer.gate is None else layer.gate.config.rule
        check(rule == path.rule, f"{name}: has the gating rule {rule}, and its budgets are of {path.rule}")
    for layer, tau in zip(layers.values(), taus, strict=True):
        layer.get_gate().set_tau(tau)
        layer.own_experts.measured.clear()


def _between(above: BudgetPoint, below: BudgetPoint, part: float) -> BudgetPoint:
    """What lies between two points, ``part`` of the way down."""

    def mixed(one: float, other: float) -> float:
        return one + (other - one) * part

    taus = tuple(mixed(one, other) for one, other in zip(above.taus, below.taus, strict=True))
    numbers = {name: mixed(getattr(above, name), getattr(below, name)) for name in (*COSTS, "divergence", "score")}
    return replace(above, taus=taus, **numbers)
