"""Rows that are written once and drawn in a new order each epoch, from memory and from disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe_pl.phases._row_cache import RowCache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    max_memory=st.integers(0, 2000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_row_once_an_epoch_within_the_memory(folder, sizes, max_memory, dtype):
    batches = [torch.full((size, 5), 1.0 + number, dtype=dtype) for number, size in enumerate(sizes)]
    cache = RowCache(len(sizes), max_memory, str(folder))
    for batch in batches:
        cache.add(batch)
    cache.complete()
    assert cache.memory <= max_memory
    assert cache.memory + cache.disk == sum(batch.nbytes for batch in batches)
    assert not list(folder.iterdir())  # what is on disk has no name that could be left behind
    for seed in range(2):
        drawn = list(cache.shuffled(seed))
        assert len(drawn) == len(sizes)
        assert max(len(rows) for rows in drawn) - min(len(rows) for rows in drawn) <= 1
        assert torch.equal(torch.cat(drawn).sort(dim=0).values, torch.cat(batches))


def test_epochs_differ_and_are_repeatable(folder):
    cache = RowCache(2, 100, str(folder))
    for rows in torch.arange(80.0).view(2, 20, 2):
        cache.add(rows)
    cache.complete()
    first, second, again = (torch.cat(list(cache.shuffled(seed))) for seed in (1, 2, 1))
    assert torch.equal(again, first)
    assert not torch.equal(first, second)
    assert cache.disk == 160 * 2


def test_what_would_fill_the_disk_is_refused(folder, monkeypatch):
    usage = type("Usage", (), {"free": 3 << 20})
    monkeypatch.setattr("d2dmoe_pl.phases._row_cache.shutil.disk_usage", lambda folder: usage)
    cache = RowCache(16, 1 << 20, str(folder))
    for _ in range(8):
        cache.add(torch.zeros(1024, 32))  # 128 KiB; 2 MiB in all
    cache.add(torch.zeros(1024, 32))  # 1 MiB beyond the memory
    cache = RowCache(21, 1 << 20, str(folder))
    for _ in range(8):
        cache.add(torch.zeros(1024, 32))
    with pytest.raises(OSError, match="about 1 MiB are needed, and half of the 3 MiB free can be taken"):
        cache.add(torch.zeros(1024, 32))
