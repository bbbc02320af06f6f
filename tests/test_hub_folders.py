"""Models by their names on the hub: from a cache that is laid out here, and what is said where the hub refuses."""

import shutil

import huggingface_hub
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification as Auto

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.errors import ConfigError

OFFLINE = {"local_files_only": True}


@pytest.fixture
def artifacts(tmp_path):
    """Two converted models, and where they lie in a cache: two revisions, and the second in a folder as well."""
    models, cache = [tiny.routed("bert"), tiny.routed("bert")], tmp_path / "cache"
    for model, commit, revision in zip(models, ("1" * 40, "2" * 40), ("main", "v2"), strict=True):
        snapshot = cache / "models--me--model" / "snapshots" / commit
        save_artifact(model, snapshot)
        (cache / "models--me--model" / "refs").mkdir(exist_ok=True)
        (cache / "models--me--model" / "refs" / revision).write_text(commit)
    shutil.copytree(snapshot, snapshot.parent / ("1" * 40) / "inner")
    return models, cache


@pytest.mark.parametrize(
    ("asked", "index"), [({}, 0), ({"revision": "v2"}, 1), ({"subfolder": "inner"}, 1)], ids=["main", "v2", "inner"]
)
def test_auto_classes_take_a_model_from_where_they_are_told(artifacts, asked, index):
    models, cache = artifacts
    loaded = Auto.from_pretrained("me/model", cache_dir=cache, **OFFLINE, **asked)
    batch = tiny.batch("bert")
    with torch.no_grad():
        assert torch.equal(tiny.logits(loaded, batch), tiny.logits(models[index], batch))


def test_a_token_reaches_the_hub(artifacts, monkeypatch):
    _, cache = artifacts
    given = {}
    folder = cache / "models--me--model" / "snapshots" / ("1" * 40)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: given.update(kwargs) or folder)
    Auto.from_pretrained("me/model", cache_dir=cache, token="secret", **OFFLINE)
    assert (given["token"], given["cache_dir"]) == ("secret", cache)


def test_what_the_hub_says_is_said_whole(monkeypatch):
    def refuses(name, revision):
        raise OSError("403 Client Error.\n\nAccess to model me/model is restricted. Ask for it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    said = r"neither a folder nor a reachable hub name \(403 Client Error. Access to model me/model is restricted. Ask"
    with pytest.raises(ConfigError, match=rf"^path='me/model': {said} for it.\)$"):
        load_model("me/model")
    with pytest.raises(ConfigError, match=rf"^path='me/model', revision='v3': {said}"):
        load_model("me/model", revision="v3")


def test_no_run_begins_with_a_converted_model(artifacts):
    _, cache = artifacts
    folder = str(cache / "models--me--model" / "snapshots" / ("1" * 40))
    with pytest.raises(ConfigError, match=rf"^name='{folder}': is a converted model, .*must be a dense one$"):
        HuggingFaceModel("text-classification", folder).build_structure(tiny.LABELS)
