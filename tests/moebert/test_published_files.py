"""Published pickles are read, and run nothing."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moebert.published_files import read_hash_list, read_importance


@pytest.fixture
def pickled(tmp_path):
    def write(value, protocol=4):
        path = tmp_path / "file.pkl"
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
        return path

    return write


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_importance_by_neuron(pickled, protocol):
    path = pickled({"importance": [[3.0, 2.0, 1], (0.3, 0.2, 0.1)], "idx": [[2, 0, 1], [0, 2, 1]]}, protocol)
    assert read_importance(path).tolist() == [[2.0, 1.0, 3.0], [0.3, 0.1, 0.2]]


def test_hash_list(pickled):
    hashes = read_hash_list(pickled([3, 0, 1, 1]))
    assert hashes.tolist() == [3, 0, 1, 1]
    assert hashes.dtype == torch.int64


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("value", "asks_for"),
    [
        (np.zeros((1, 2)), "numpy"),
        ({"importance": np.float64(1.0), "idx": []}, "numpy"),
        (torch.zeros(1), "torch"),
        (collections.OrderedDict(), "collections.OrderedDict"),
        (Evil(), "posix.system"),
        (print, "builtins.print"),
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("read", [read_importance, read_hash_list])
def test_any_class_is_refused_by_name(pickled, value, asks_for, protocol, read):
    prefix = {"builtins": "__builtin__"}.get(asks_for.partition(".")[0], asks_for) if protocol < 3 else asks_for
    with pytest.raises(ConfigError, match=rf"_file='.*file.pkl': the pickle asks for {prefix}.*; allowed are") as info:
        read(pickled(value, protocol))
    assert "\n" not in str(info.value)


def test_an_object_by_persistent_id_is_refused(pickled):
    with pytest.raises(ConfigError, match="is no whole pickle"):
        read_hash_list(pickled(b"\x80\x02X\x01\x00\x00\x00aQ."))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"hello", pickle.dumps([1, 2, 3])[:-2]])
def test_no_pickle_at_all(pickled, content):
    with pytest.raises(ConfigError, match=r"importance_file='.*': is no whole pickle") as info:
        read_importance(pickled(content))
    assert "\n" not in str(info.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"hash_list_file='.*nowhere': cannot be read \(No such file or directory\)"):
        read_hash_list(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, [], ["a"], [1.5], [[1], [2]], [[1], [2, 3]], [True], "12", 3, {1, 2}, None]
)
def test_other_values_in_place_of_a_hash_list(pickled, value):
    with pytest.raises(ConfigError, match=r"the hash list: must be a list of integers|asks for"):
        read_hash_list(pickled(value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must hold a dict with the keys importance and idx"),
        ({"importance": [[1.0]]}, "must hold a dict with the keys importance and idx"),
        ({"importance": [1.0], "idx": [[0]]}, "importance: must be a list of lists of numbers"),
        ({"importance": [[float("nan")]], "idx": [[0]]}, "importance: must be a list of lists of numbers"),
        ({"importance": [[1.0]], "idx": [[0.0]]}, "idx: must be a list of lists of integers"),
        ({"importance": [[1.0, 2.0]], "idx": [[0, 0]]}, "idx must hold every neuron of a layer once"),
        ({"importance": [[1.0, 2.0]], "idx": [[0, 1], [1, 0]]}, "idx must hold every neuron of a layer once"),
    ],
)
def test_other_values_in_place_of_importance(pickled, value, message):
    with pytest.raises(ConfigError, match=message):
        read_importance(pickled(value))
