"""Means of weights, and the choice among several."""

from functools import partial

import pytest
import torch
from torch import nn

from d2dmoe_pl.phases._weight_average import WeightAverage, between, put_best_, state_of


def test_the_mean_is_that_of_all_steps():
    model, average, seen = nn.Linear(3, 2), WeightAverage(), []
    for _ in range(5):
        with torch.no_grad():
            model.weight.normal_()
        average.add(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(average.mean["weight"], torch.stack(seen).mean(dim=0))
    again = WeightAverage()
    again.load_state_dict(average.state_dict())
    assert (again.steps, set(again.mean)) == (5, {"weight", "bias"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_steps_in_a_narrow_type(dtype):
    model, average = nn.Linear(3, 2).to(dtype), WeightAverage()
    for step in range(600):
        with torch.no_grad():
            model.weight.fill_(step / 600)
        average.add(model)
    torch.testing.assert_close(average.mean["weight"], torch.full((2, 3), 0.5), atol=3e-3, rtol=0)


def test_between_states_of_two_types():
    made = between({"weight": torch.zeros(2)}, {"weight": torch.ones(2, dtype=torch.bfloat16)}, 0.25)
    assert made["weight"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({"before": [1.0, 0.1], "after": [0.5, 0.1]}, "after"),
        ({"before": [1.0, 0.1], "after": [0.9, 0.2]}, "before"),  # twice as large where it is small
        ({"before": [1.0, 0.1], "a": [0.8, 0.1], "b": [0.5, 0.105]}, "a"),  # a little worse somewhere
        ({"before": [1.0, 1.0], "a": [1.0, 1.0]}, "before"),
    ],
)
def test_what_is_better_and_nowhere_worse_is_taken(losses, best):
    model = nn.Linear(1, 1, bias=False)
    states = {name: {"weight": torch.full((1, 1), float(index))} for index, name in enumerate(losses)}
    in_order = list(losses.values())
    made = {name: partial(dict, state) for name, state in states.items()}
    found, scores = put_best_(model, made, lambda: in_order[int(model.weight)])
    assert found == best
    assert scores["before"] == 1
    assert torch.equal(model.weight, states[best]["weight"])


def test_statistics_go_with_the_weights():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    average, before = WeightAverage(), state_of(model)
    for _ in range(4):
        model(torch.randn(8, 2) + 5)
        average.add(model)
    means = model[0].running_mean.clone()
    assert average.mean["0.running_mean"].abs().sum() > 0
    found, _ = put_best_(
        model,
        {"before": lambda: before, "after": lambda: state_of(model)},
        lambda: [float(1 + model[0].running_mean.sum())],
    )
    assert found == "before"
    assert torch.equal(model[0].running_mean, torch.zeros(2))
    assert not torch.equal(means, torch.zeros(2))
    assert "0.num_batches_tracked" not in before


def test_between():
    one, other = ({"a": torch.tensor([value])} for value in (1.0, 3.0))
    assert between(one, other, 0.25)["a"].item() == 1.5
    model = nn.Linear(1, 1)
    copied = state_of(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(copied["weight"], model.weight)
