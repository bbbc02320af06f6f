"""Evaluation mode for a while."""

import contextlib

from torch import nn

from d2dmoe_pl.evaluation_mode import evaluating


def test_each_part_is_as_it_was_behind_it():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()  # as what is frozen is
    before = [module.training for module in model.modules()]
    with contextlib.suppress(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before
