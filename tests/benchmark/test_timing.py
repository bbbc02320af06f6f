"""Calls are timed in turn, and memory is what the allocator says."""

import itertools
from contextlib import contextmanager

import pytest
import torch

from d2dmoe_pl.benchmark import comparison, timing
from d2dmoe_pl.benchmark.comparison import Comparison, Way, ideal_speed_up, measure
from d2dmoe_pl.benchmark.timing import Contender, Timing, alternate, peak_memory, summarise

CPU = torch.device("cpu")


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0.0)  # one call a sample
    called = []
    contenders = {name: Contender(lambda name=name: called.append(name)) for name in ("dense", "moe")}
    assert set(alternate(contenders, 4, CPU)) == {"dense", "moe"}
    assert called == ["dense", "moe"] * (2 + 4)  # two to warm up


def test_there_is_silence_before_each_sample(monkeypatch):
    """In which a thread of the one before ends its waiting."""
    clock = [0.0]
    waits_until = [0.0]

    def waiting():  # as ONNX Runtime does
        clock[0] += 1.0
        waits_until[0] = clock[0] + 0.03

    def call():
        clock[0] += 2.0 if clock[0] < waits_until[0] else 1.0

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", sleep)
    contenders = {"other": Contender(waiting), "own": Contender(call)}
    assert alternate(contenders, 4, CPU)["own"].median == pytest.approx(2.0)
    assert alternate(contenders, 4, CPU, pause=0.1)["own"].median == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "threads", "is_silent"), [("onnxruntime", 2, True), ("onnxruntime", 1, False), ("auto", 2, False)]
)
def test_only_threads_of_other_runtimes_are_waited_for(name, threads, is_silent, monkeypatch):
    pauses = []

    def timed(contenders, rounds, device, pause):
        pauses.append(pause)
        return dict.fromkeys(contenders, Timing(1.0, 0.0))

    monkeypatch.setattr(comparison, "alternate", timed)
    monkeypatch.setattr(comparison.torch, "get_num_threads", lambda: threads)
    way = Way(name, False, None, 1.0, 1.0, Contender(lambda: None))
    compared = Comparison("model", "some", torch.float32, 4, 1, 8, Contender(lambda: None), [way])
    measure(compared, 3, CPU)
    assert (pauses[0] > 0.03) is is_silent


@pytest.mark.parametrize(("at_most", "rounds"), [(18.0, 9), (17.0, 8), (1.0, 5)])
def test_what_is_slow_is_called_in_fewer_rounds(at_most, rounds, monkeypatch):
    clock = [0.0]

    def call():
        clock[0] += 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    alternate({"a": Contender(call), "b": Contender(call)}, 9, CPU, at_most)
    assert clock[0] == 2 * (2 + rounds)


def test_a_sample_is_the_mean_of_the_calls_that_fill_it(monkeypatch):
    """With a clock that a call moves on by 4 ms, and reading it by nothing."""
    now = itertools.count(0.0)
    calls = []
    clock = [0.0]

    def call():
        calls.append(next(now))
        clock[0] += 0.004

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    result = alternate({"a": Contender(call)}, 2, CPU)["a"]
    assert result == Timing(pytest.approx(0.004), pytest.approx(0.0))
    assert len(calls) == 2 + 2 * 3  # 3 calls of 4 ms fill 10 ms


def test_settings_are_entered_outside_the_clock(monkeypatch):
    clock = [0.0]
    inside = []

    @contextmanager
    def setting():
        clock[0] += 100.0
        inside.append(True)
        yield
        inside.pop()
        clock[0] += 100.0

    def call():
        assert inside
        clock[0] += 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert alternate({"a": Contender(call, setting)}, 2, CPU)["a"].median == pytest.approx(1.0)


def test_median_and_half_the_interquartile_range():
    assert summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 1.0)
    assert not Timing(1.0, 0.1).is_noisy
    assert Timing(1.0, 0.11).is_noisy


def test_gradients_are_off():
    seen = []
    alternate({"a": Contender(lambda: seen.append(torch.is_grad_enabled()))}, 2, CPU)
    assert not any(seen)


def test_peak_memory_counts_what_is_held_at_once():
    mib = 2**20

    def call():
        torch.empty(8 * mib, dtype=torch.uint8)  # let go at once
        first = torch.empty(3 * mib, dtype=torch.uint8)
        second = torch.empty(6 * mib, dtype=torch.uint8)
        return first, second

    assert peak_memory(Contender(call), CPU) == 9 * mib
    assert peak_memory(Contender(lambda: None), CPU) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu():
    assert peak_memory(Contender(lambda: torch.empty(2**20, device="cuda")), torch.device("cuda")) == 4 * 2**20


def test_ideal():
    dense, rest = Timing(10.0, 0.0), Timing(4.0, 0.0)
    assert ideal_speed_up(dense, None, 0.2) == pytest.approx(5.0)
    assert ideal_speed_up(dense, rest, 0.5) == pytest.approx(10 / (4 + 3))
    assert ideal_speed_up(dense, rest, 1.0) == pytest.approx(1.0)
