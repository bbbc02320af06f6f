"""Several processes split the FFNs of a deep model; what they give is what one process gives."""

import os

import pytest
import torch

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.splitting import SPLITS
from d2dmoe_pl.moe.splitting._several_ffns import split_each


def profiles(number):
    return [(torch.zeros(24, 5), torch.randn(24, 7), 6, seed) for seed in range(number)]


@pytest.mark.parametrize("number", [1, 2, pytest.param(5, marks=pytest.mark.thorough)])
def test_processes_give_the_same_in_the_same_order(number):
    torch.manual_seed(0)
    arguments, split = profiles(number), SPLITS.find("activation", "split")
    alone, together = (list(split_each(split, iter(arguments), number, long, 2)) for long in (1e9, 0.0))
    assert len(alone) == number
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


class WhoAmI:
    def __call__(self):
        return os.getpid()


def test_only_long_work_is_given_away():
    here = os.getpid()
    assert set(split_each(WhoAmI(), [()] * 4, 4, 1e9, 2)) == {here}
    first, *others = split_each(WhoAmI(), [()] * 4, 4, 0.0, 2)
    assert first == here
    assert here not in others


class Refuses:
    def __call__(self, number):
        if number:
            raise ConfigError(f"num_experts={number}: is refused")


def test_what_a_process_refuses_is_said_as_here():
    with pytest.raises(ConfigError, match=r"^num_experts=1: is refused$"):
        list(split_each(Refuses(), [(0,), (1,), (0,)], 3, 0.0, 2))
