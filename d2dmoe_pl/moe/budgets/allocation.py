"""Which layer to lower next: greedy allocation of a budget to layers.

As TEAL (arXiv 2408.14690) does for the sparsity of activations; here for the tau of each layer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from d2dmoe_pl.moe.gating._gate import GATING_RULES
from d2dmoe_pl.moe.gating._ordered import order_for

# one for all layers, to be no worse than that
UNIFORM_TAUS = (0.98, 0.95, 0.92, *(i / 20 for i in range(18, 5, -1)), 0.2, 0.1)
ENOUGH_TOKENS = 256  # of a batch, whose shares are looked at
# where they are, to find a grid of each layer's own
FINE_TAUS = (*(i / 100 for i in range(100)), 0.995, 0.999, 1.0)


@dataclass(frozen=True)
class Measured:
    """What a setting of all layers gives.

    Attributes:
        taus: Of each layer.
        divergence: From the predictions with every expert on.
        cost: FLOPs, in whatever unit.
    """

    taus: tuple[float, ...]
    divergence: float
    cost: float


def shares_at(scores: Tensor, rule: str) -> Tensor:
    """The share of experts that run at each of ``FINE_TAUS``.

    Args:
        scores: ``(N, E)``; of many tokens, some are looked at, evenly spaced.
        rule: Gating rule.

    Returns:
        ``(len(FINE_TAUS),)`` float64.
    """
    choose = GATING_RULES.find(rule, "rule")
    some = scores[:: max(1, len(scores) // ENOUGH_TOKENS)]
    order = order_for(choose, some)
    return torch.stack([choose(some, tau, **order).double().mean() for tau in FINE_TAUS])


def tau_grid(shares: Sequence[float], keep: float) -> list[float]:
    """Settings of one layer from 1 down to 0, each of which runs about ``keep`` of the experts of the one before.

    Args:
        shares: That run at each of ``FINE_TAUS``, rising.
        keep: In (0, 1).

    Returns:
        Falling; 1 first and 0 last.
    """
    grid = [1.0]
    wanted = keep
    while wanted > shares[0]:
        # the largest setting that runs no more than is wanted
        tau = max((tau for tau, share in zip(FINE_TAUS, shares, strict=True) if share <= wanted), default=0.0)
        if tau < grid[-1]:
            grid.append(tau)
        wanted *= keep
    return grid if grid[-1] == 0.0 else [*grid, 0.0]


def greedy_path(grids: Sequence[Sequence[float]], measure: Callable[[Sequence[float]], Measured]) -> list[Measured]:
    """The settings on the way from every expert on to the fewest: each lowers one layer by one step of its grid.

    The layer whose step adds the least divergence per FLOP that it saves goes first. What a step is worth is measured
    anew when its turn comes, and only then: the layers before it in the order have moved since.

    Args:
        grids: Of each layer, falling from the dense end.
        measure: Runs the calibration samples with a tau for each layer.

    Returns:
        The first has every layer at the start of its grid, the last at its end.

    Example:
        >>> from d2dmoe_pl.moe.budgets.allocation import Measured, greedy_path
        >>> harm = [1.0, 10.0]
        >>> def measure(taus):
        ...     return Measured(tuple(taus), sum(h * (1 - tau) for h, tau in zip(harm, taus)), sum(taus))
        >>> [each.taus for each in greedy_path([[1.0, 0.5, 0.0]] * 2, measure)]
        [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (0.0, 0.5), (0.0, 0.0)]
    """
    places = [0] * len(grids)
    now = measure([grid[0] for grid in grids])
    path = [now]
    prices: dict[int, float] = {layer: -float("inf") for layer, grid in enumerate(grids) if len(grid) > 1}
    tried: dict[int, Measured] = {}  # at the present places
    while prices:
        layer = min(prices, key=lambda each: prices[each])
        if layer not in tried:
            taus = [grid[place] for grid, place in zip(grids, places, strict=True)]
            taus[layer] = grids[layer][places[layer] + 1]
            tried[layer] = measure(taus)
            prices[layer] = _price(now, tried[layer])
            continue
        now = tried[layer]
        path.append(now)
        tried = {}
        places[layer] += 1
        if places[layer] + 1 == len(grids[layer]):
            del prices[layer]
    return path


def additive_path(
    grids: Sequence[Sequence[float]], divergences: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]
) -> list[Measured]:
    """The same way down where what each layer's step adds does not depend on the other layers; steps may be skipped.

    Args:
        grids: Of each layer, falling from the dense end.
        divergences: Of each layer, at each step of its grid.
        costs: The same.

    Returns:
        The first has every layer at the start of its grid, the last at the cheapest of its steps.

    Example:
        >>> from d2dmoe_pl.moe.budgets.allocation import additive_path
        >>> path = additive_path([[1.0, 0.5, 0.0]] * 2, [[0.0, 1.0, 1.5], [0.0, 4.0, 9.0]], [[2.0, 1.0, 0.0]] * 2)
        >>> [each.taus for each in path]
        [(1.0, 1.0), (0.0, 1.0), (0.0, 0.5), (0.0, 0.0)]
    """
    places = [0] * len(grids)

    def here() -> Measured:
        def total(of: Sequence[Sequence[float]]) -> float:
            return sum(each[place] for each, place in zip(of, places, strict=True))

        taus = tuple(grid[place] for grid, place in zip(grids, places, strict=True))
        return Measured(taus, total(divergences), total(costs))

    path = [here()]
    while True:
        steps = [
            ((divergences[layer][to] - divergences[layer][place]) / (costs[layer][place] - costs[layer][to]), layer, to)
            for layer, place in enumerate(places)
            for to in range(place + 1, len(grids[layer]))
            if costs[layer][to] < costs[layer][place]
        ]
        if not steps:
            return path
        _, layer, places[layer] = min(steps)
        path.append(here())


def _price(before: Measured, after: Measured) -> float:
    """Added divergence per FLOP saved; a step that saves nothing is taken at once."""
    saved = before.cost - after.cost
    return (after.divergence - before.divergence) / saved if saved > 0 else -float("inf")


def lower_envelope(settings: Iterable[Measured]) -> list[Measured]:
    """Those that none of the others beats by cost and by divergence, the dearest first.

    Args:
        settings: In any order, e.g. of a greedy path and of one tau for all layers.

    Example:
        >>> from d2dmoe_pl.moe.budgets.allocation import Measured, lower_envelope
        >>> settings = [Measured((1.0,), 0.0, 3.0), Measured((0.5,), 0.4, 2.0), Measured((0.4,), 0.2, 1.5)]
        >>> [each.taus for each in lower_envelope(settings)]
        [(1.0,), (0.4,)]
    """
    found: list[Measured] = []
    for each in sorted(settings, key=lambda each: (each.cost, each.divergence)):  # the cheapest first
        if not found or each.divergence < found[-1].divergence:
            found.append(each)
    return found[::-1]


def filled(path: Sequence[Measured], costs: Sequence[Sequence[float]], gap: float = 0.01) -> list[Measured]:
    """A way down with points in between, where costs are further apart than a share ``gap`` of the lower one.

    What a layer costs does not fall evenly with its tau, so that half-way between two settings the cost is not. Points
    are put where the layers that change cost as much less as the whole is to.

    Args:
        path: Each cheaper than the one before.
        costs: Of each layer, at each of ``FINE_TAUS``, rising, in whatever unit.
        gap: In (0, 1).

    Example:
        >>> from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS, Measured, filled
        >>> ends = [Measured((1.0,), 0.0, 1.0), Measured((0.0,), 1.0, 0.5)]
        >>> squares = [[(1 + tau**2) / 2 for tau in FINE_TAUS]]
        >>> [round(each.taus[0], 2) for each in filled(ends, squares, gap=0.5)]
        [1.0, 0.64, 0.0]
    """
    points = [*path[:1]]
    for above, below in pairwise(path):
        ratio = below.cost / above.cost
        parts = math.ceil(-math.log(ratio) / math.log1p(gap)) if 0 < ratio < 1 else 1
        for part in range(1, parts):
            way = (1 - ratio ** (part / parts)) / (1 - ratio)
            taus = tuple(
                a if a == b else _tau_between(a, b, way, of_layer)
                for a, b, of_layer in zip(above.taus, below.taus, costs, strict=True)
            )
            divergence = above.divergence + way * (below.divergence - above.divergence)
            points.append(Measured(taus, divergence, above.cost + way * (below.cost - above.cost)))
        points.append(below)
    return points


def _tau_between(above: float, below: float, way: float, costs: Sequence[float]) -> float:
    """The setting that costs as much less than ``above`` as is ``way`` of the difference to ``below``."""
    first, last = np.interp((above, below), FINE_TAUS, costs)
    if first == last:
        return above + way * (below - above)
    tau = float(np.interp(first + way * (last - first), costs, FINE_TAUS))
    return min(max(tau, min(above, below)), max(above, below))


def next_places(measured: Mapping[int, float], length: int, number: int, higher_is_better: bool = True) -> list[int]:
    """Where to measure next on a way of ``length`` points: evenly at first, then where values change the most.

    Args:
        measured: Values by where they are; none at first.
        length: How many places there are.
        number: How many to take; at first at least both ends, later fewer where no gap is left to halve.
        higher_is_better: Otherwise values have no upper end, as perplexities: they count as shares, of the first over
            each, or what nobody would go to would take all places.

    Example:
        >>> from d2dmoe_pl.moe.budgets.allocation import next_places
        >>> next_places({}, 9, 3)
        [0, 4, 8]
        >>> next_places({0: 90.0, 4: 89.0, 8: 60.0}, 9, 1)
        [6]
        >>> next_places({0: 30.0, 4: 60.0, 8: 9000.0}, 9, 1, higher_is_better=False)
        [2]
    """
    if measured and not higher_is_better:
        measured = {place: measured[min(measured)] / value for place, value in measured.items()}
    if not measured:
        return sorted({round(i * (length - 1) / max(1, number - 1)) for i in range(number)})
    gaps = [(low, high) for low, high in pairwise(sorted(measured)) if high - low > 1]
    gaps.sort(key=lambda gap: abs(measured[gap[1]] - measured[gap[0]]), reverse=True)
    return sorted((low + high) // 2 for low, high in gaps[:number])


def interpolated(points: Mapping[int, float], at: float) -> float:
    """The value at ``at`` on the lines through ``points``; that of the nearest beyond their ends.

    Args:
        points: Values by where they are.
        at: Where the value is wanted.
    """
    places = sorted(points)
    if at <= places[0]:
        return points[places[0]]
    for low, high in pairwise(places):
        if at <= high:
            return points[low] + (points[high] - points[low]) * (at - low) / (high - low)
    return points[places[-1]]
