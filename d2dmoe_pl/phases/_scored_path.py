"""Costs and scores of a way down, on many samples: measured at some of its points, those between interpolated."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.metrics.flops import SampleSize, flops_outside_ffns, sample_inputs, sample_sizes
from d2dmoe_pl.moe.budgets.allocation import Measured, interpolated, next_places
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, falling
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._beside_dense import BesideDense
from d2dmoe_pl.phases._held_out import held_out, moved, summed
from d2dmoe_pl.phases._phase import Phase

UNEVEN = 0.02  # of a cost, by which what lies between two points may be off
HALVINGS = 2  # of gaps in which it may be more


def scored_path(phase: Phase, way: Sequence[Measured], rule: str, num_samples: int, num_points: int) -> BudgetPath:
    """The budgets that a way down answers, of samples of the validation split.

    Args:
        phase: In its trainer; its model has gates.
        way: From every expert on to the fewest, with costs of other samples.
        rule: Gating rule of all layers.
        num_samples: To measure on.
        num_points: How many points are measured, more of them where the score changes fast.
    """
    task, batches = phase.task, held_out(phase, num_samples)
    samples = BesideDense(phase, batches, keeps_vocabulary=True)
    sums: dict[int, list[float]] = {}
    scores: dict[int, float] = {}
    later = num_points // 5
    for number in (num_points - 3 * later, *[later] * 3):
        if steps := next_places(scores, len(way), number, task.higher_is_better):
            _measure(phase, way, steps, samples, sums, scores)
    for _ in range(HALVINGS):
        if steps := _uneven(_factors(sums, way), later):
            _measure(phase, way, steps, samples, sums, scores)
    beside = _flops_outside(phase, batches)
    share_outside = beside / (beside + sums[0][2])  # of the dense model's
    factors = _factors(sums, way)
    divergences = {step: divergence / weight for step, (divergence, _, _, weight) in sums.items()}
    points = []
    for step, each in enumerate(way):
        cost = each.cost * interpolated(factors, step)
        whole = share_outside + (1 - share_outside) * cost
        points.append(BudgetPoint(each.taus, cost, whole, interpolated(divergences, step), interpolated(scores, step)))
    return BudgetPath(
        tuple(moe_layers(phase.model)),
        rule,
        task.main_metric,
        task.in_percent,
        task.higher_is_better,
        int(summed(phase, torch.tensor(sum(len(batch["labels"]) for batch in batches), device=phase.device))),
        falling(points),
        task.is_share_of_samples,
    )


def _factors(sums: Mapping[int, Sequence[float]], way: Sequence[Measured]) -> dict[int, float]:
    """By what the costs of few samples are off: by what hardly changes from one point to the next, mostly."""
    return {step: flops / dense / way[step].cost for step, (_, flops, dense, _) in sums.items()}


def _uneven(factors: Mapping[int, float], most: int) -> list[int]:
    """Halfway between points whose factors differ, as where cutoffs begin to count: those that differ most."""
    gaps = [
        (abs(factors[after] / factors[before] - 1), (before + after) // 2)
        for before, after in pairwise(sorted(factors))
        if after - before > 1
    ]
    return [place for difference, place in sorted(gaps, reverse=True)[:most] if difference > UNEVEN]


def _measure(
    phase: Phase,
    way: Sequence[Measured],
    steps: Sequence[int],
    samples: BesideDense,
    sums: dict[int, list[float]],
    scores: dict[int, float],
) -> None:
    """Measure the points ``steps`` of ``way``: what :class:`BesideDense` sums up into ``sums``, and ``scores``."""
    task = phase.task
    totals = torch.zeros(len(steps), 4, dtype=torch.float64, device=phase.device)
    metrics = [task.metrics().to(phase.device) for _ in steps]
    for number, batch in enumerate(samples.batches):
        on_device = moved(phase, batch)
        for place, step in enumerate(steps):  # all of a batch together: what one needs is held, not what all do
            logits, added = samples.run(number, way[step].taus)
            totals[place] += added
            metrics[place].update(logits, phase.with_written(on_device))
        samples.leave(number)
    for step, total, metric in zip(steps, summed(phase, totals).tolist(), metrics, strict=True):
        score = float(metric.compute()[task.main_metric])
        sums[step], scores[step] = total, 100 * score if task.in_percent else score


def _flops_outside(phase: Phase, batches: Sequence[Batch]) -> float:
    """FLOPs outside the FFNs of all samples, over all processes."""
    known: dict[SampleSize, int] = {}
    total = 0.0
    for batch in batches:
        on_device, sizes = moved(phase, batch), sample_sizes(batch)
        for size in set(sizes) - known.keys():
            known[size] = flops_outside_ffns(phase.model, sample_inputs(on_device, size))
        total += sum(known[size] for size in sizes)
    return float(summed(phase, torch.tensor(total, dtype=torch.float64, device=phase.device)))
