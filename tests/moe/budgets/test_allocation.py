"""Greedy allocation: cheap steps first, whole ways down, as few measurements as are needed."""

import itertools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe_pl.moe.budgets.allocation import (
    FINE_TAUS,
    Measured,
    filled,
    greedy_path,
    interpolated,
    next_places,
    shares_at,
    tau_grid,
)

HARMS = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


def additive(harms, calls=None):
    """Each layer costs its tau, and harms by the square of what it lacks."""

    def measure(taus):
        if calls is not None:
            calls.append(tuple(taus))
        harm = sum(harm * (1 - tau) ** 2 for harm, tau in zip(harms, taus, strict=True))
        return Measured(tuple(taus), harm, sum(taus))

    return measure


@given(HARMS, st.integers(2, 6))
@settings(deadline=None)
def test_each_point_is_the_best_of_its_cost_where_layers_do_not_act_on_one_another(harms, steps):
    grid = [1 - i / (steps - 1) for i in range(steps)]
    path = greedy_path([grid] * len(harms), additive(harms))
    assert len(path) == 1 + len(harms) * (steps - 1)
    assert path[0].taus == (1.0,) * len(harms)
    assert path[-1].taus == (0.0,) * len(harms)
    prices = [b.divergence - a.divergence for a, b in itertools.pairwise(path)]  # all steps save the same
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(prices))
    for before, after in itertools.pairwise(path):
        assert sum(a != b for a, b in zip(before.taus, after.taus, strict=True)) == 1


def test_only_what_may_be_next_is_measured():
    calls = []
    path = greedy_path([[1.0, 0.5, 0.0]] * 6, additive([1, 2, 4, 8, 16, 32], calls))
    assert len(calls) < 2.5 * len(path)  # and not six for each
    assert len(set(calls)) >= len(path)


def test_a_step_that_saves_nothing_is_taken_at_once():
    def measure(taus):
        return Measured(tuple(taus), 1 - taus[0], taus[0])

    assert [each.taus for each in greedy_path([[1.0, 0.0], [1.0, 0.0]], measure)][-1] == (0.0, 0.0)


@given(
    st.integers(1, 30), st.integers(2, 40), st.sampled_from(["dynk_max", "dynk_cumulative", "topk"]), st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_a_grid_falls_by_about_one_share_a_step(tokens, num_experts, rule, seed):
    torch.manual_seed(seed)
    shares = shares_at(torch.rand(tokens, num_experts).square(), rule).tolist()
    assert all(a <= b for a, b in itertools.pairwise(shares))
    grid = tau_grid(shares, 0.75)
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(grid))
    share = dict(zip(FINE_TAUS, shares, strict=True))
    for before, after in itertools.pairwise(grid):
        assert share[after] < share[before] or share[after] <= 0.75


@given(st.integers(1, 5), st.sampled_from(["dynk_max", "dynk_cumulative"]), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_what_lies_between_two_points_costs_what_it_says(layers, rule, seed):
    torch.manual_seed(seed)
    shares = [shares_at(torch.rand(200, 32) ** (1 + 3 * layer), rule).tolist() for layer in range(layers)]

    def measure(taus):
        run = [np.interp(tau, FINE_TAUS, of_layer) for tau, of_layer in zip(taus, shares, strict=True)]
        return Measured(tuple(taus), 1 - sum(run) / layers, sum(run) + 0.1)

    path = greedy_path([tau_grid(of_layer, 0.5) for of_layer in shares], measure)
    points = filled(path, shares)
    assert [point for point in points if point in path] == path
    for before, after in itertools.pairwise(points):
        assert after.cost < before.cost <= 1.0101 * after.cost
        assert abs(measure(after.taus).cost / after.cost - 1) < 0.01


def test_points_that_are_near_have_none_between():
    near = [Measured((1.0,), 0.0, 1.0), Measured((0.9,), 0.1, 0.995)]
    assert filled(near, [list(FINE_TAUS)]) == near


@given(st.integers(1, 60), st.lists(st.integers(2, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_nothing_is_measured_twice_and_both_ends_are(length, numbers, random):
    measured = {}
    for number in numbers:
        places = next_places(measured, length, number)
        assert len(places) <= number
        assert not measured.keys() & set(places)
        assert all(0 <= place < length for place in places)
        measured |= {place: random.random() for place in places}
    assert {0, length - 1} <= measured.keys()


def test_a_fall_at_the_end_is_found_by_as_many_measurements():
    values = [93 - 4 * 0.7 ** (359 - place) for place in range(360)]  # all of it in the last dozen

    def furthest_off(measured):
        return max(abs(interpolated(measured, place) - value) for place, value in enumerate(values))

    evenly = {place: values[place] for place in next_places({}, 360, 20)}
    found = {}
    for number in (8, 4, 4, 4):
        found |= {place: values[place] for place in next_places(found, 360, number)}
    assert len(found) == len(evenly) == 20
    assert furthest_off(found) < 0.7 * furthest_off(evenly)


def test_what_nobody_would_go_to_takes_no_places_from_the_rest():
    perplexities = [30 * math.exp(9 * (place / 359) ** 3) for place in range(360)]  # up to 243,092

    def furthest_off(higher_is_better):
        measured = {}
        for number in (4, 2, 2, 2):
            places = next_places(measured, 360, number, higher_is_better)
            measured |= {place: perplexities[place] for place in places}
        useful = [place for place, value in enumerate(perplexities) if value < 90]
        return max(abs(interpolated(measured, place) / perplexities[place] - 1) for place in useful)

    assert furthest_off(higher_is_better=False) < 0.5 * furthest_off(higher_is_better=True)


def test_interpolation():
    assert [interpolated({0: 1.0, 4: 3.0, 6: 0.0}, at) for at in (-1, 0, 2, 4, 5, 9)] == [1.0, 1.0, 2.0, 3.0, 1.5, 0.0]
