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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
class TestNumPy:
    def test_a_list_of_numpys_integers(self, pickled, protocol):
        assert read_hash_list(pickled([np.int64(3), np.int32(0), np.uint8(1), 2], protocol)).tolist() == [3, 0, 1, 2]

    @pytest.mark.parametrize("dtype", ["float64", "float32", ">f4", "float16"])
    def test_arrays(self, pickled, protocol, dtype):
        scores = np.arange(6, dtype=dtype).reshape(2, 3)
        for value in (scores, list(scores), np.asfortranarray(scores), scores.tolist()):
            assert read_importance(pickled(value, protocol)).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert read_hash_list(pickled(np.array([2, 1], dtype=">i8"), protocol)).tolist() == [2, 1]

    @pytest.mark.parametrize("value", [np.array([Ellipsis], dtype=object), np.array(["a"]), np.array([1j])])
    def test_arrays_of_anything_but_numbers(self, pickled, protocol, value):
        with pytest.raises(ConfigError, match=r"is no whole pickle|asks for"):
            read_importance(pickled(value, protocol))


class TestSeveral:
    def test_scores_add(self, tmp_path):
        for rank in range(2):
            (tmp_path / f"importance_{rank}.pkl").write_bytes(pickle.dumps([[1.0 + rank, 2.0], [3.0, 4.0 * rank]]))
        for paths in ([tmp_path / "importance_0.pkl", tmp_path / "importance_1.pkl"], tmp_path / "importance_*.pkl"):
            assert read_importance(paths).tolist() == [[3.0, 4.0], [6.0, 4.0]]

    def test_of_different_models(self, tmp_path):
        for i in range(2):
            (tmp_path / f"{i}.pkl").write_bytes(pickle.dumps([[1.0] * (i + 1)]))
        with pytest.raises(
            ConfigError, match=r"importance_file='.*1.pkl': has scores of \(1, 2\); must be \(1, 1\), as"
        ):
            read_importance([tmp_path / "0.pkl", tmp_path / "1.pkl"])

    def test_none(self):
        with pytest.raises(ConfigError, match=r"importance_file=\[\]: must be one file at least"):
            read_importance([])


def test_a_function_that_numpy_needs_can_be_given_no_state(pickled):
    """A pickle that would change what one of the functions does for the next pickle."""
    tampering = b"\x80\x02cnumpy._core.multiarray\nscalar\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b."
    with pytest.raises(ConfigError, match="is no whole pickle"):
        read_hash_list(pickled(tampering))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("value", "asks_for"),
    [
        (np.zeros((1, 2)).view(np.recarray), "numpy"),
        (np.datetime64("2020").dtype.type, "numpy.datetime64"),
        (torch.zeros(1), "torch"),
        (collections.OrderedDict(), "collections.OrderedDict"),
        (Evil(), "posix.system"),
        (print, "builtins.print"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
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
        ([1], "must be a list of lists of numbers"),
        ([[1.0], [float("inf")]], r"': has inf; must be finite numbers"),
        ([[1.0], [1.0, 2.0]], "must be a list of lists of numbers"),
        ("scores", "must hold lists of scores, layers x d_ff, or a dict with the keys importance and idx"),
        ({"importance": [[1.0]]}, "must hold lists of scores, layers x d_ff, or a dict with the keys importance and"),
        ({"importance": [1.0], "idx": [[0]]}, "importance: must be a list of lists of numbers"),
        ({"importance": [[float("nan")]], "idx": [[0]]}, "importance: has nan; must be finite numbers"),
        ({"importance": [[1.0]], "idx": [[0.0]]}, "idx: must be a list of lists of integers"),
        ({"importance": [[1.0, 2.0]], "idx": [[0, 0]]}, "idx must hold every neuron of a layer once"),
        ({"importance": [[1.0, 2.0]], "idx": [[0, 1], [1, 0]]}, "idx must hold every neuron of a layer once"),
    ],
)
def test_other_values_in_place_of_importance(pickled, value, message):
    with pytest.raises(ConfigError, match=message):
        read_importance(pickled(value))
