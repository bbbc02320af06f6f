"""The budget that does what is wished for."""

from typing import Any

from torch import nn

from d2dmoe_pl.chain_status import say
from d2dmoe_pl.compression.target import Target
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint
from d2dmoe_pl.phases._labels import answer_as_model
from d2dmoe_pl.report.measured_speed import measured_times

STEPS = 9  # from the least to every expert on, whose speed is measured


def budget_for(target: Target, path: BudgetPath, model: nn.Module, data: TaskData, batch_size: int) -> BudgetPoint:
    """The budget that does what is wished for; the nearest that there is, which is said."""
    if path.in_percent and path.higher_is_better and path.dense.score <= 0:
        wish = (f"{target}", ", or a target in FLOPs") if target.kind == "drop" else (f"What {target} loses", "")
        say(
            f"{wish[0]} cannot be told here: {path.metric.replace('_', ' ')} is 0 with every expert on, so that no "
            f"setting is worse. Another metric of the data tells more{wish[1]}.",
            "yellow",
        )
    if target.kind == "drop":
        return path.at_drop(target.value)
    if target.kind == "speed":
        return _fast_enough(target.value, path, model, data, batch_size)
    least = getattr(path.points[-1], target.kind)
    if target.value < least:
        say(
            f"{target} cannot be reached: {100 * least:.1f}% is the least of this model, and what it is set to.",
            "yellow",
        )
    return path.at_cost(target.kind, max(target.value, least))


def _fast_enough(speed: float, path: BudgetPath, model: nn.Module, data: TaskData, batch_size: int) -> BudgetPoint:
    """The largest budget that is so many times as fast as dense, by times that are measured here."""
    least = path.points[-1].ffn_flops
    budgets = [least ** (1 - step / STEPS) for step in range(STEPS + 1)]
    data.setup()
    answer_as_model(data, model)
    loader: Any = data.drawn_loader("test", batch_size)
    batch = {key: value for key, value in next(iter(loader)).items() if key != "labels"}
    dense, times = measured_times(model, batch, budgets)
    check(
        not dense.is_noisy,
        f"target='speed={speed:g}x': this machine is too noisy to tell, the dense model's times are spread by "
        f"{dense.spread / dense.median:.0%}; stop what else runs, and run this again: nothing is trained anew",
    )
    found = {budget: dense.median / timing.median for budget, timing in times.items()}
    enough = [budget for budget, times_as_fast in found.items() if times_as_fast >= speed]
    if not enough:
        budget = max(found, key=lambda each: found[each])
        say(
            f"speed={speed:g}x cannot be reached here: {found[budget]:.2f}x is the most, and what it is set to.",
            "yellow",
        )
        return path.at_cost("ffn_flops", budget)
    return path.at_cost("ffn_flops", max(enough))
