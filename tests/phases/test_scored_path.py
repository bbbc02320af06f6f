"""Which points of a way down are measured."""

from d2dmoe_pl.phases._scored_path import _uneven


def test_points_whose_costs_are_off_differently_are_measured_halfway():
    factors = {0: 1.0, 8: 1.0, 16: 1.04, 20: 1.10, 21: 1.3, 40: 1.31}
    assert _uneven(factors, 9) == [18, 12]  # 20 and 21 have nothing between them
    assert _uneven(factors, 1) == [18]
    assert _uneven({0: 1.0, 9: 1.01}, 9) == []
