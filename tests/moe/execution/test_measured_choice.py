"""Of several ways the fastest is taken, by a measurement on first use; as on a GPU, by another clock."""

import tiny
import torch
from ffns import make_ffn

from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.execution._measured_choice import fastest
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import moe_layers


def test_once_for_a_power_of_two_of_tokens():
    experts, calls = Experts(make_ffn(6, 12), 3), []
    times = {"slow": 2.0, "fast": 1.0}

    def run(way):
        calls.append(way)
        return way

    def asked(tokens):
        return fastest(times, run, experts, torch.randn(tokens, 6), lambda call: times[call()])

    assert [asked(tokens) for tokens in (5, 6, 7)] == ["fast"] * 3
    assert calls == ["slow", "fast"] * 2  # to warm up, and to be timed
    times["slow"] = 0.5
    assert asked(7) == "fast"
    assert asked(8) == "slow"
    experts.set_backend("auto")
    assert asked(7) == "slow"


def test_a_way_that_needs_more_memory_than_there_is_is_not_taken():
    def run(way):
        if way in too_large:
            raise torch.OutOfMemoryError
        return way

    def asked(tokens):
        times = {"fast": 1.0, "slow": 2.0}
        return fastest(times, run, experts, torch.randn(tokens, 6), lambda call: times[call()])

    experts, too_large = Experts(make_ffn(6, 12), 3), {"fast"}
    assert asked(5) == "slow"
    too_large.add("slow")
    assert not asked(9)  # by rule, whose error is the caller's


def test_another_tau_is_measured_anew():
    model = tiny.routed()
    experts = next(iter(moe_layers(model).values())).experts
    experts.measured["shape"] = "slow"
    set_tau_(model, 0.3)
    assert not experts.measured
