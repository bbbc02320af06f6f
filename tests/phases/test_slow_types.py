"""A CPU that is slow in bfloat16 is told before hours go by."""

import time
from types import SimpleNamespace

import pytest
import torch

from d2dmoe_pl.phases import _slow_types
from d2dmoe_pl.phases._slow_types import bfloat16_slowdown, say_if_slow


def trainer(precision, device="cpu"):
    return SimpleNamespace(precision=precision, strategy=SimpleNamespace(root_device=torch.device(device)))


def said(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def _new_process():
    _slow_types._say.cache_clear()
    yield
    _slow_types._say.cache_clear()


def test_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(_slow_types, "bfloat16_slowdown", lambda: 7.96)
    for _ in range(2):
        say_if_slow(trainer("bf16-mixed"))
    assert said(caplog) == [
        "precision=bf16-mixed: products in bfloat16 take 8.0 times as long as in float32 on this CPU; "
        "trainer.precision=32-true is faster here."
    ]


@pytest.mark.parametrize(
    ("precision", "device", "times"), [("32-true", "cpu", 8.0), ("bf16-true", "cuda", 8.0), ("bf16-mixed", "cpu", 1.9)]
)
def test_where_nothing_is_said(monkeypatch, caplog, precision, device, times):
    monkeypatch.setattr(_slow_types, "bfloat16_slowdown", lambda: times)
    say_if_slow(trainer(precision, device))
    assert not said(caplog)


def test_it_is_measured(monkeypatch):
    def linear(a, b):
        time.sleep(0.05 if a.dtype == torch.bfloat16 else 0.01)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert 3 < bfloat16_slowdown.__wrapped__() < 6
