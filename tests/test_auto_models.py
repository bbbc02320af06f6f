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
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_, set_budget_path_
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


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_type_is_given_as_transformers_takes_it(saved, dtype):
    _, folder = saved("llama-causal-language-modeling")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("make", ["routed", "hash_random", "gate_sentence"])
def test_what_is_under_a_head_runs_and_saves_itself_alone(saved, tmp_path, make):
    model, folder = saved("bert", tiny.routed if make == "routed" else lambda _: tiny.moebert(make))
    if make == "routed":
        names = tuple(moe_layers(model))
        points = (BudgetPoint((1.0,) * 2, 1.0, 1.0, 0.0, 90.0), BudgetPoint((0.2,) * 2, 0.3, 0.6, 0.4, 80.0))
        set_budget_path_(model, BudgetPath(names, "dynk_max", "accuracy", True, True, 100, points))
        save_artifact(model, folder)
    base = transformers.AutoModel.from_pretrained(folder)
    batch = {key: value for key, value in tiny.batch("bert").items() if key != "labels"}
    real = batch["attention_mask"].bool()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True).hidden_states[-1][real]
        for each in (base, transformers.AutoModel.from_pretrained(tmp_path / "base"), load_model(tmp_path / "base")):
            torch.testing.assert_close(each(**batch).last_hidden_state[real], wanted)
            if make == "routed":
                set_budget_(copy.deepcopy(each), ffn_flops=0.3)


def test_another_head_is_refused(saved):
    _, folder = saved("bert")
    with pytest.raises(ValueError, match="is a BertForSequenceClassification, no AutoModelForQuestionAnswering"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["t5-text-to-text", "whisper", "clip", "siglip"])
def test_what_has_no_part_without_its_head_is_refused(saved, kind):
    model, folder = saved(kind)
    with pytest.raises(ValueError, match=f"is a {type(model).__name__}, no AutoModel"):
        transformers.AutoModel.from_pretrained(folder)


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


@pytest.mark.thorough
def test_without_the_package_it_fails_loudly(saved):
    _, folder = saved("bert")
    said = run(PLAIN, folder)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.split()) == 5
    assert "loaded" not in said.stdout


@pytest.mark.thorough
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

    def test_what_else_is_in_the_folder_stays(self, tmp_path):
        model, out = tiny.routed("bert"), tmp_path / "out"
        kept = ["checkpoint-2/optimizer.pt", "adapter.safetensors", "model_card.md"]
        replaced = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
        for name in (*kept, *replaced):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("here before")
        for _ in range(2):
            model.save_pretrained(out)
            there = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
            assert there == {*kept, "config.json", "d2dmoe.safetensors"}
            same("bert", load_model(out), model)

    def test_a_trainer_keeps_its_checkpoints(self, tmp_path):
        settings = transformers.TrainingArguments(
            tmp_path / "out", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        samples = [{key: value[i] for key, value in tiny.batch("bert").items()} for i in range(2)]
        trainer = transformers.Trainer(tiny.routed("bert"), settings, train_dataset=samples)
        trainer.train()
        trainer.save_model()
        there = {file.name for file in (tmp_path / "out").iterdir()}
        assert {"checkpoint-1", "checkpoint-2", "d2dmoe.safetensors", "config.json"} <= there
        same("bert", load_model(tmp_path / "out" / "checkpoint-2"), trainer.model.eval())

    def test_a_link_to_a_folder_and_the_folder_one_is_in(self, tmp_path, monkeypatch):
        model = tiny.routed("bert")
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
        for _ in range(2):
            model.save_pretrained(tmp_path / "link")
            save_artifact(model, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
        same("bert", load_model(tmp_path / "real"), model)
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        model.save_pretrained(".")
        same("bert", load_model(tmp_path / "other"), model)

    def test_other_processes_write_nothing(self, tmp_path):
        tiny.routed("bert").save_pretrained(tmp_path / "out", is_main_process=False)
        assert not (tmp_path / "out").exists()

    def test_other_weights_than_its_own(self, tmp_path):
        model = tiny.routed("bert")
        copied = {name: value.clone() for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / "out", state_dict=copied)
        copied["classifier.bias"] += 1
        with pytest.raises(ConfigError, match=r"^state_dict: classifier.bias is not what the model has; must be left"):
            model.save_pretrained(tmp_path / "out", state_dict=copied)
        with pytest.raises(ConfigError, match=r"^push_to_hub=True: must be false for a converted model; upload"):
            model.save_pretrained(tmp_path / "out", push_to_hub=True)

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
