"""Converted models through transformers' own ways in and out: as they are if the package is imported, else not."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import timm
import tiny
import torch
import transformers

from d2dmoe_pl.artifact import load_model, read_artifact, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers

AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "gpt2-causal-language-modeling": transformers.AutoModelForCausalLM,
    "vit": transformers.AutoModelForImageClassification,
    "bert-question-answering": transformers.AutoModelForQuestionAnswering,
}


@pytest.fixture
def saved(tmp_path):
    def make(kind="bert", make=tiny.routed):
        model = make(kind)
        save_artifact(model, tmp_path / "artifact")
        return model, str(tmp_path / "artifact")

    return make


@torch.no_grad()
def same(kind, one, other):
    batch = tiny.batch(kind)
    torch.testing.assert_close(
        tiny.logits_of_tokens(one, batch), tiny.logits_of_tokens(other, batch)
    ) if kind != "vit" else (torch.testing.assert_close(tiny.logits(one, batch), tiny.logits(other, batch)))


@pytest.mark.parametrize("make", [tiny.routed, tiny.with_projections])
@pytest.mark.parametrize("kind", AUTO)
def test_auto_classes_give_the_converted_model(saved, kind, make):
    model, folder = saved(kind, make)
    loaded = AUTO[kind].from_pretrained(folder)
    assert type(loaded) is type(model)
    same(kind, loaded, model)
    assert AUTO[kind].from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    base = transformers.AutoModel.from_pretrained(folder)
    assert type(base) is type(model.base_model)


def test_another_head_is_refused(saved):
    _, folder = saved("bert")
    with pytest.raises(ValueError, match="is a BertForSequenceClassification, no AutoModelForQuestionAnswering"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(folder)


def test_a_pipeline_runs_it(saved):
    model, folder = saved("bert")
    tiny.tokenizer(folder, "abcd", ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    pipe = transformers.pipeline("text-classification", model=folder, top_k=None)
    (result,) = pipe(["a b c"])
    scores = {each["label"]: each["score"] for each in result}
    with torch.no_grad():
        logits = model(**pipe.tokenizer("a b c", return_tensors="pt")).logits
    expected = dict(zip(tiny.LABELS, logits.softmax(-1)[0].tolist(), strict=True))
    assert scores == pytest.approx(expected, abs=1e-5)


PLAIN = """
import sys, timm, transformers
folder = sys.argv[1]
ways = [transformers.AutoConfig, transformers.AutoModelForSequenceClassification, transformers.AutoModel]
ways += [transformers.BertForSequenceClassification, transformers.BertModel]
for way in ways:
    try:
        way.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        print(type(error).__name__)
    else:
        print(f"{way.__name__} loaded it")
"""
LOADED = """
from transformers import AutoModelForSequenceClassification
print(type(AutoModelForSequenceClassification.from_pretrained(sys.argv[1])).__name__)
"""


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def test_without_the_package_it_fails_loudly(saved):
    _, folder = saved("bert")
    said = run(PLAIN, folder)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.split()) == 5
    assert "loaded" not in said.stdout


@pytest.mark.parametrize("order", [("d2dmoe_pl", "json"), ("transformers.models.auto.modeling_auto", "d2dmoe_pl")])
def test_with_the_package_imported_before_or_after(saved, order):
    _, folder = saved("bert")
    code = "\n".join(f"import {name}" for name in ("sys", *order)) + LOADED
    said = run(code, folder)
    assert said.stdout.split() == ["BertForSequenceClassification"], said.stderr


def test_timm_refuses_it_too(saved):
    _, folder = saved("timm_vit")
    with pytest.raises((RuntimeError, OSError)):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


class TestSavePretrained:
    @pytest.mark.parametrize("kind", ["bert", "gpt2-causal-language-modeling"])
    def test_the_gate_that_was_set_is_kept(self, saved, tmp_path, kind):
        _, folder = saved(kind)
        model = load_model(folder)
        set_tau_(model, 0.3)
        out = tmp_path / "out"
        tiny.tokenizer(out, "abcd")
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            one.save_pretrained(out)
            loaded = load_model(out)
            assert {layer.gate.config.tau for layer in moe_layers(loaded).values()} == {0.3}
            same(kind, loaded, model)
            assert (out / "tokenizer.json").is_file()
        assert "d2dmoe" not in model.config.to_dict()

    def test_a_model_converted_in_code(self, tmp_path):
        model = tiny.routed("bert")
        model.save_pretrained(tmp_path / "out")
        same("bert", load_model(tmp_path / "out"), model)

    def test_a_model_that_is_dense_again(self, tmp_path):
        model = tiny.routed("bert")
        merge_to_dense_(model)
        model.save_pretrained(tmp_path / "out")
        same("bert", transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), model)


class TestMissingParts:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda ours: ours.pop("family"), "d2dmoe.family in config.json is missing or no str"),
            (lambda ours: ours.pop("layers"), "d2dmoe.layers in config.json is missing or no dict"),
            (lambda ours: ours.pop("history"), "d2dmoe.history in config.json is missing or no list"),
            (lambda ours: ours.update(history=[]), "d2dmoe.history in config.json is empty"),
            (lambda ours: ours.update(history=["x"]), "d2dmoe.history in config.json must hold records of phase"),
            (lambda ours: ours.update(layers=[]), "d2dmoe.layers in config.json is missing or no dict"),
            (lambda ours: ours.update(tensors=["../x"]), "names '../x', which is no file in the folder"),
            (lambda ours: ours.update(tensors="x"), "d2dmoe.tensors in config.json is missing or no list"),
        ],
    )
    def test_is_told(self, saved, change, message):
        _, folder = saved("bert")
        file = read_artifact(folder).path / "config.json"
        config = json.loads(file.read_text())
        change(config["d2dmoe"])
        file.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=message):
            load_model(folder)
        file.write_text(json.dumps({**config, "d2dmoe": 3}))
        with pytest.raises(ConfigError, match=r"the key 'd2dmoe' in config.json holds int"):
            load_model(folder)


class TestHub:
    def test_a_name_on_the_hub(self, saved, monkeypatch):
        model, folder = saved("bert")
        asked = []
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download", lambda name, revision: asked.append((name, revision)) or folder
        )
        same("bert", load_model("organisation/name", revision="main"), model)
        assert asked == [("organisation/name", "main")]

    def test_a_hub_that_cannot_be_reached(self):
        with pytest.raises(ConfigError, match="path='nobody/nothing': neither a folder nor a reachable hub name"):
            load_model("nobody/nothing")
