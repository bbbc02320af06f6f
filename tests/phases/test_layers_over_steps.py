"""Pictures of layers over steps are drawn as often as they have something new to show."""

import pytest
import torch

from d2dmoe_pl.phases._layers_over_steps import MOST, LayersOverSteps


def added(over_steps, number, start=0):
    for step in range(start, start + number):
        over_steps.add("loss", step, {"one": torch.tensor(float(step)), "two": torch.tensor(0.0)})


def test_a_picture_at_twice_the_values_and_one_at_the_end():
    over_steps = LayersOverSteps()
    assert over_steps.figures() == over_steps.figures(is_last=True) == {}
    drawn = []
    for step in range(100):
        added(over_steps, 1, step)
        if over_steps.figures():
            drawn.append(step + 1)
    assert drawn == [1, 2, 4, 8, 16, 32, 64]
    assert list(over_steps.figures(is_last=True)) == ["loss"]
    assert over_steps.figures(is_last=True) == {}  # nothing new


@pytest.mark.parametrize("number", [1, 7, MOST, 3 * MOST])
def test_a_picture_has_all_of_the_course(number):
    over_steps = LayersOverSteps()
    added(over_steps, number)
    axes = over_steps.figures()["loss"].axes[0]
    shown = axes.images[0].get_array()
    assert shown.shape[0] == 2
    assert shown.shape[1] <= MOST
    assert (shown[0].min(), shown[0].max()) == (0, number - 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
