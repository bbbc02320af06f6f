"""Weights are written tensor by tensor, as safetensors reads them, in shards where they are large."""

import json

import pytest
import safetensors.torch
import tiny
import torch
import transformers

from d2dmoe_pl.artifact import load_model, read_artifact, save_artifact
from d2dmoe_pl.errors import ConfigError, NonFiniteWeightsError
from d2dmoe_pl.weights_writing import DTYPES, write_weights

SMALL = 4000  # bytes


def test_a_file_is_what_safetensors_writes(tmp_path):
    model = tiny.dense("gpt2-causal-language-modeling")  # its head is tied to its embeddings
    model.register_buffer("counts", torch.arange(6).reshape(2, 3).t())  # of another type, not contiguous
    model.register_buffer("count", torch.tensor(7, dtype=torch.int8))
    model.register_buffer("none", torch.zeros(0, 2, dtype=torch.bool))
    write_weights(model, tmp_path, "ours.safetensors")
    safetensors.torch.save_model(model, str(tmp_path / "theirs.safetensors"), metadata={"format": "pt"})
    ours, theirs = (
        safetensors.safe_open(str(tmp_path / name), "pt") for name in ("ours.safetensors", "theirs.safetensors")
    )
    assert ours.metadata() == theirs.metadata()
    assert set(ours.keys()) == set(theirs.keys())
    for name in ours.keys():  # noqa: SIM118
        one, other = ours.get_tensor(name), theirs.get_tensor(name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_type_that_safetensors_has(tmp_path, dtype):
    layer = torch.nn.Module()
    layer.register_buffer("before", torch.ones(3, dtype=torch.int8))  # narrower, and odd
    layer.register_buffer("values", torch.arange(6).reshape(2, 3).t().to(dtype))
    layer.register_buffer("one", torch.ones((), dtype=dtype))
    write_weights(layer, tmp_path, "a.safetensors")
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == {"before", "values", "one"}
    for name, values in layer.state_dict().items():
        assert read[name].dtype == values.dtype
        assert torch.equal(read[name].to(torch.complex64), values.to(torch.complex64))


def test_conjugates_are_written_as_what_they_are(tmp_path):
    layer = torch.nn.Module()
    layer.register_buffer("values", torch.tensor([1 + 2j, 3 - 4j]).conj())
    write_weights(layer, tmp_path, "a.safetensors")
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["values"].tolist() == [1 - 2j, 3 + 4j]


def test_complex_weights_that_are_no_numbers_are_refused(tmp_path):
    model = tiny.dense()
    model.turns = torch.nn.Parameter(torch.tensor([1 + 2j, complex(0, torch.nan)]))
    with pytest.raises(NonFiniteWeightsError, match=r"^turns: the weights hold NaN"):
        save_artifact(model, tmp_path / "artifact")


def test_a_type_that_safetensors_lacks_is_told_with_its_name(tmp_path):
    layer = torch.nn.Module()
    layer.register_buffer("turns", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ConfigError, match=r"^turns: is of torch.complex128, which safetensors lacks; must be of comp"):
        write_weights(layer, tmp_path, "a.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama-causal-language-modeling", "gpt2-causal-language-modeling", "timm_vit"])
def test_shards_give_the_model_back(tmp_path, kind):
    model = tiny.routed(kind)
    save_artifact(model, tmp_path, max_shard_size=SMALL)
    files = sorted(tmp_path.glob("d2dmoe-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"d2dmoe-00001-of-{len(files):05}.safetensors"
    assert read_artifact(tmp_path).weights == files
    for file in files:
        tensors = safetensors.torch.load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SMALL
    torch.testing.assert_close(load_model(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_transformers_reads_the_shards_of_a_dense_model(tmp_path):
    model = tiny.dense("gpt2-causal-language-modeling")
    save_artifact(model, tmp_path, max_shard_size=SMALL)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(read.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_trainers_folder_has_shards_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(save_artifact, "__defaults__", (*save_artifact.__defaults__[:-1], SMALL))
    model = tiny.routed("llama-causal-language-modeling")
    model.save_pretrained(tmp_path, state_dict=None)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert all((tmp_path / file).is_file() for file in index["weight_map"].values())


def test_a_shard_that_is_missing_is_told(tmp_path):
    save_artifact(tiny.routed(), tmp_path, max_shard_size=SMALL)
    next(tmp_path.glob("d2dmoe-00002-*")).unlink()
    with pytest.raises(ConfigError, match=r"d2dmoe-00002-of-\d+.safetensors is missing or truncated"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [("{", "cannot be read"), ('{"weight_map": {"a": "../b"}}', "names '../b', which is no file in the folder")],
)
def test_an_index_that_is_none_is_told(tmp_path, index, said):
    save_artifact(tiny.routed(), tmp_path, max_shard_size=SMALL)
    (tmp_path / "d2dmoe.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=rf"d2dmoe.safetensors.index.json {said}"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [0, "5GB"])
def test_sizes_are_positive_numbers(tmp_path, size):
    with pytest.raises(ConfigError, match=rf"^max_shard_size={size!r}: must be positive, bytes as a number$"):
        save_artifact(tiny.routed(), tmp_path / "artifact", max_shard_size=size)
    assert not (tmp_path / "artifact").exists()
