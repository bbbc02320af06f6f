"""What a report draws is there and true, of runs with many splits and with a single setting."""

import numpy as np
import pytest

from d2dmoe_pl.callbacks.sweep_table import SweepRow, draw_curve
from d2dmoe_pl.report.drawings import curve, layers

pytestmark = pytest.mark.drawn


def row(stage="test", tau=1.0, share=100.0):
    of_layers = {"blocks.0": share, "blocks.1": share}
    return SweepRow(stage, tau, 0.5, "accuracy", 90.0, True, True, share, share, 1e6, share, of_layers)


def test_every_split_has_a_curve_however_many_there_are():
    splits = [f"test_{i}" for i in range(6)]
    (axis,) = curve([row(split, tau) for split in splits for tau in (0.5, 1.0)], None, None, None, "accuracy %").axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == splits


@pytest.mark.parametrize("share", [100.0, 0.0, 12.5])
def test_colours_of_layers_have_a_range_where_all_run_alike(share):
    (image,) = layers([row(share=share)]).axes[0].get_images()
    assert image.norm.vmin <= 10 < image.norm.vmax == 100
    assert image.norm(100.0) == 1.0
    assert np.isfinite(image.norm(max(share, 1e-3)))


@pytest.mark.parametrize(("taus", "said"), [([1.0], "tau 1"), ([1.0, 0.5, 0.7], "tau 0.5 to 1"), ([None], "")])
def test_the_legend_says_what_is_swept(taus, said):
    (axis,) = draw_curve([row(tau=tau) for tau in taus], {}).axes
    assert axis.get_legend().get_texts()[0].get_text() == (f"test, {said}" if said else "test")
