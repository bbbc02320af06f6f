"""Budgets: what is asked for is what is set, or a line says why not."""

import json

import pytest
import tiny

from d2dmoe_pl import load_model, save_artifact, set_budget_, set_tau_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import (
    BudgetPath,
    BudgetPoint,
    budget_path,
    falling,
    path_from_json,
    set_budget_path_,
)
from d2dmoe_pl.moe.conversion import add_cutoffs_, add_routers_, add_stand_ins_, set_gate_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig

POINTS = (
    BudgetPoint((1.0, 1.0), 1.02, 1.01, 0.0, 90.0),
    BudgetPoint((0.8, 1.0), 0.62, 0.81, 0.1, 90.4),
    BudgetPoint((0.8, 0.5), 0.22, 0.61, 0.2, 88.0),
    BudgetPoint((0.0, 0.5), 0.12, 0.56, 0.8, 89.0),
)


def path_of(**kwargs):
    made = {"layers": ("blocks.0.mlp", "blocks.1.mlp"), "rule": "dynk_max", "metric": "accuracy", "in_percent": True}
    return BudgetPath(**{**made, "higher_is_better": True, "samples": 400, "points": POINTS, **kwargs})


@pytest.fixture
def model():
    model = tiny.routed()
    set_budget_path_(model, path_of())
    return model


def taus(model):
    return [layer.gate.config.tau for layer in moe_layers(model).values()]


@pytest.mark.parametrize(
    ("asked", "expected", "score"),
    [
        ({"ffn_flops": 1.02}, [1.0, 1.0], 90.0),  # with routers
        ({"ffn_flops": 0.62}, [0.8, 1.0], 90.4),
        ({"ffn_flops": 0.42}, [0.8, 0.75], 89.2),
        ({"ffn_flops": 0.12}, [0.0, 0.5], 89.0),
        ({"flops": 0.91}, [0.9, 1.0], 90.2),
        ({"drop": 0.0}, [0.8, 1.0], 90.4),
        ({"drop": 1.5}, [0.8, 1.0], 90.4),  # a later point is better, but one on the way is not
        ({"drop": 2.0}, [0.0, 0.5], 89.0),
    ],
)
def test_what_is_asked_for_is_set(model, asked, expected, score):
    point = set_budget_(model, **asked)
    assert taus(model) == pytest.approx(expected)
    assert point.score == pytest.approx(score)
    for name, value in asked.items():
        if name != "drop" and value <= 1:
            assert getattr(point, name) == pytest.approx(value)


@pytest.mark.parametrize(("asked", "expected"), [(2.0, 0), (1.02, 0), (1.0, 1), (0.62, 1), (0.61, 2), (0.12, 3)])
def test_between_two_numbers_of_experts_is_no_budget(asked, expected):
    assert path_of(rule="topk").at_cost("ffn_flops", asked) == POINTS[expected]


def test_a_drop_of_an_error_is_a_rise():
    path = path_of(higher_is_better=False, in_percent=False, metric="perplexity")
    assert path.at_drop(0.5).taus == (0.0, 0.5)
    assert path.standard_error(10.0) is None


def test_standard_error():
    assert path_of(is_share_of_samples=True).standard_error(90.0) == pytest.approx(1.5)
    assert path_of(metric="pearson").standard_error(90.0) is None


def test_a_path_that_an_earlier_version_saved_is_read():
    made = path_of().as_json()
    del made["is_share_of_samples"]
    assert path_from_json(made) == path_of()


def test_is_saved_with_the_model_and_forgotten_by_no_copy(model, tmp_path):
    save_artifact(model, tmp_path / "artifact")
    loaded = load_model(tmp_path / "artifact")
    assert budget_path(loaded) == path_of()
    set_budget_(loaded, ffn_flops=0.42)
    assert taus(loaded) == pytest.approx([0.8, 0.75])
    assert path_from_json(json.loads(json.dumps(path_of().as_json()))) == path_of()


def test_taus_of_layers_are_kept_one_by_one(model, tmp_path):
    set_budget_(model, ffn_flops=0.22)
    save_artifact(model, tmp_path / "artifact")
    assert taus(load_model(tmp_path / "artifact")) == [0.8, 0.5]


def test_points_that_are_no_cheaper_are_left_out():
    dearer = BudgetPoint((0.5, 1.0), 0.9, 0.9, 0.1, 90.4)
    assert falling([*POINTS[:2], dearer, *POINTS[2:]]) == POINTS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "budget: exactly one of ffn_flops, flops, drop must be given"),
        ({"flops": 0.6, "drop": 1.0}, "budget: exactly one of ffn_flops, flops, drop must be given"),
        (
            {"ffn_flops": 0.1},
            "ffn_flops=0.1: less than this model can do; must be at least 0.1200, with the fewest experts on",
        ),
        ({"drop": -0.5}, "drop=-0.5: must not be negative"),
        ({"ffn_flops": 25}, "ffn_flops=25: must be at most 1, all that the dense model costs; 25% is 0.25"),
        ({"flops": 1.5}, "flops=1.5: must be at most 1, all that the dense model costs; 25% is 0.25"),
    ],
)
def test_what_cannot_be(model, asked, message):
    with pytest.raises(ConfigError) as error:
        set_budget_(model, **asked)
    assert str(error.value) == message
    assert taus(model) == [0.5, 0.5]


def test_a_model_without_a_path(model):
    set_budget_path_(model, None)
    set_budget_path_(model, None)
    with pytest.raises(ConfigError) as error:
        set_budget_(model, ffn_flops=0.5)
    expected = "VisionTransformer: knows no budgets yet; run BudgetCalibration first, or use set_tau_"
    assert str(error.value) == expected


def test_a_model_that_has_changed_since(model):
    set_gate_(model, GateConfig("topk", tau=0.5))
    with pytest.raises(ConfigError, match=r"blocks.0.mlp: has the gating rule topk, and its budgets are of dynk_max"):
        set_budget_(model, ffn_flops=0.5)
    set_budget_path_(model, path_of(layers=("blocks.0.mlp", "elsewhere")))
    with pytest.raises(ConfigError, match="has other MoE layers than those that BudgetCalibration saw"):
        set_budget_(model, ffn_flops=0.5)


def test_tau_can_still_be_set(model):
    set_budget_(model, ffn_flops=0.42)
    set_tau_(model, 0.3)
    assert taus(model) == [0.3, 0.3]


def test_a_message_names_a_share_that_is_taken(model):
    least = 0.12341
    set_budget_path_(model, path_of(points=(*POINTS[:3], BudgetPoint((0.0, 0.5), least, 0.56, 0.8, 89.0))))
    with pytest.raises(ConfigError, match=r"must be at least 0\.1235, with the fewest experts on"):
        set_budget_(model, ffn_flops=0.1234)
    assert set_budget_(model, ffn_flops=0.1235).ffn_flops == pytest.approx(0.1235)


def test_a_score_that_is_no_number_is_no_small_loss(model):
    unknown = float("nan")
    set_budget_path_(model, path_of(points=(*POINTS[:2], BudgetPoint((0.8, 0.5), 0.22, 0.61, 0.2, unknown), POINTS[3])))
    assert set_budget_(model, drop=50.0).taus == POINTS[1].taus


@pytest.mark.parametrize("value", ["0.3", [0.3, 0.4], True])
@pytest.mark.parametrize("name", ["ffn_flops", "flops", "drop"])
def test_what_is_no_number(model, name, value):
    with pytest.raises(ConfigError, match=rf"{name}=.*: must be a number"):
        set_budget_(model, **{name: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda model: add_routers_(model, RouterConfig(4)),
        lambda model: add_stand_ins_(model, StandInConfig(2)),
        lambda model: add_cutoffs_(model, CutoffConfig(0.5)),
    ],
)
def test_parts_that_budgets_were_not_measured_with(model, change):
    change(model)
    with pytest.raises(ConfigError, match="knows no budgets yet; run BudgetCalibration first"):
        set_budget_(model, ffn_flops=0.5)
