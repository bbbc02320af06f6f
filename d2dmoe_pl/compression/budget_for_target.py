"""The budget that does what is wished for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sklearn.isotonic import IsotonicRegression

from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.chain_status import say
from d2dmoe_pl.compression.target import Target
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint

Measure = Callable[[Sequence[float]], tuple[Timing, Mapping[float, Timing]]]

STEPS = 9  # from the least to every expert on, whose speed is measured


@dataclass(frozen=True)
class Found:
    """What does what is wished for.

    Attributes:
        point: The budget.
        times_as_fast: As what the wish is told beside; None where the clock was not asked.
    """

    point: BudgetPoint
    times_as_fast: float | None = None


def budget_for(target: Target, path: BudgetPath, measure: Measure) -> Found:
    """The budget that does what is wished for; the nearest that there is, which is said.

    Args:
        target: The wish.
        path: What there is.
        measure: Of budgets, gives the time of what a speed is told beside, and of each; called for those alone.
    """
    if path.in_percent and path.higher_is_better and path.dense.score <= 0:
        wish = (f"{target}", ", or a target in FLOPs") if target.kind == "drop" else (f"What {target} loses", "")
        say(
            f"{wish[0]} cannot be told here: {path.metric.replace('_', ' ')} is 0 with every expert on, so that no "
            f"setting is worse. Another metric of the data tells more{wish[1]}.",
            "yellow",
        )
    if target.kind == "drop":
        return Found(path.at_drop(target.value))
    if target.kind == "speed":
        return _fast_enough(target, path, measure)
    least = getattr(path.points[-1], target.kind)
    if target.value < least:
        say(
            f"{target} cannot be reached: {100 * least:.1f}% is the least of this model, and what it is set to.",
            "yellow",
        )
    return Found(path.at_cost(target.kind, max(target.value, least)))


def _fast_enough(target: Target, path: BudgetPath, measure: Measure) -> Found:
    """The largest budget that is so many times as fast, by times that are measured here."""
    least = path.points[-1].ffn_flops
    budgets = [least ** (1 - step / STEPS) for step in range(STEPS + 1)]
    beside, times = measure(budgets)
    check(
        not beside.is_noisy,
        f"target='{target}': this machine is too noisy to tell, the dense model's times are spread by "
        f"{beside.spread / beside.median:.0%}; stop what else runs, and run this again: nothing is trained anew",
    )
    # a larger budget takes no less time: what was measured otherwise is noise, and the luckiest would be chosen
    seconds = IsotonicRegression().fit_transform(budgets, [times[budget].median for budget in budgets])
    found = {budget: beside.median / fitted for budget, fitted in zip(budgets, seconds.tolist(), strict=True)}
    enough = [budget for budget, times_as_fast in found.items() if times_as_fast >= target.value]
    budget = max(enough) if enough else max(found, key=lambda each: found[each])
    if not enough:
        say(f"{target} cannot be reached here: {found[budget]:.2f}x is the most, and what it is set to.", "yellow")
    return Found(path.at_cost("ffn_flops", budget), found[budget])
