"""Recipes as their comments say to run them, on small local stand-ins; and what ends them at once."""

import collections
import json
import pickle
import shlex
from pathlib import Path

import pytest
import stand_ins
import tiny
import transformers
from stand_ins import SMALL, SMALL_CLASSIFIER, SMALL_IMAGENET, SMALL_SELECTION, SMALL_SQUAD, SMALL_STREAM

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
PHASES = ["FineTuning", "ImportanceScoring", "MoEBERTDistillation"]
THOROUGH = pytest.mark.thorough
DISTILLATION = "moebert_distillation.model.init_args"


def commented(recipe, indent=""):
    """The words of what a recipe's comments say to type, those on top or those indented so far."""
    lines, begin = (CONFIGS / f"{recipe}.yaml").read_text().splitlines(), f"{indent}#   "
    typed = [line.removeprefix(begin) for line in lines if line.startswith(begin)]
    return shlex.split(" ".join(typed).replace("\\", ""))


def commands(recipe):
    """The arguments of every command in the comment on top of a recipe."""
    found = []
    for word in commented(recipe):
        if word == "python":
            found.append([])
        elif word != "main.py":
            found[-1].append(word)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with what the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    stand_ins.write_bert(tmp_path / "bert")
    stand_ins.write_mnli(tmp_path / "mnli")
    stand_ins.write_squad(tmp_path / "squad")
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "small", "metrics"),
    [
        ("moebert_mnli", SMALL, {"test/accuracy", "test_mismatched/accuracy"}),
        ("moebert_squad", SMALL_SQUAD, {"test/exact_match", "test/f1"}),
    ],
)
def test_from_local_files(folder, recipe, small, metrics):
    main([*commands(recipe)[-1], *small])
    artifact = read_artifact(folder / "runs" / recipe / "moebert_distillation" / "artifact")
    assert [record.phase for record in artifact.history] == PHASES
    assert all(metrics <= set(record.metrics) for record in artifact.history)
    assert artifact.stage == "routed"
    assert {(made["num_experts"], made["expert_dim"]) for made in artifact.layers.values()} == {(4, 12)}
    assert (artifact.path / "tokenizer.json").is_file()
    assert read_artifact(folder / "runs" / recipe / "importance_scoring" / "artifact").tensors == ["importance"]
    # one expert of a quarter of the neurons runs for each token
    rows = [row.split(",") for row in (artifact.path.parent / "tau_sweep.csv").read_text().splitlines()]
    shares = {float(row[rows[0].index("experts_percent")]) for row in rows[1:]}
    assert shares == {25.0}


@pytest.mark.parametrize(
    ("recipe", "kind"), [("d2dmoe_gpt2_openwebtext", "gpt2"), pytest.param("d2dmoe_gemma_c4", "gemma", marks=THOROUGH)]
)
def test_streams_of_local_files(tmp_path, monkeypatch, recipe, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    stand_ins.write_decoder(tmp_path / kind, kind)
    stand_ins.write_texts(tmp_path / "texts")
    local = [word.replace(".jsonl.gz", ".jsonl") for word in commands(recipe)[-1]]
    main([*local, *SMALL_STREAM])
    artifact = read_artifact(tmp_path / "runs" / recipe / "router_regression" / "artifact")
    assert artifact.stage == "routed"
    assert all(record.metrics["test/perplexity"] > 1 for record in artifact.history)
    header, *rows = (artifact.path.parent / "tau_sweep.csv").read_text().splitlines()
    assert "perplexity" in header.split(",")
    assert len(rows) == 2 * 10


@pytest.mark.parametrize(
    ("recipe", "last", "points"),
    [
        pytest.param("d2dmoe_bert_emotion", "router_regression", 11, marks=THOROUGH),
        pytest.param("d2dmoe_relu_bert_emotion", "router_regression", 11, marks=THOROUGH),
        pytest.param("d2dmoe_relu_vit_pets", "router_regression", 11, marks=THOROUGH),
        pytest.param("moefication_bert_emotion", "expert_selection", 4, marks=THOROUGH),
        pytest.param("d2dmoe_vit_pets", "router_regression", 11, marks=THOROUGH),
        ("moefication_vit_pets", "expert_selection", 4),
        ("minilm_emotion", "budget_calibration", 2),
        pytest.param("cifar10_vit", "budget_calibration", 2, marks=THOROUGH),
        pytest.param("cifar10_vit_projections", "recovery_tuning", 15, marks=THOROUGH),
        pytest.param("cifar10_vit_moefication", "expert_selection", 4, marks=THOROUGH),
    ],
)
def test_classifiers_from_local_files(folder, recipe, last, points):
    stand_ins.write_emotion(folder / "emotion")
    stand_ins.write_vit(folder / "vit")
    stand_ins.write_images(folder / "pets", {"train": 30, "test": 6})
    stand_ins.write_images(folder / "cifar10", {"train": 200 if last == "budget_calibration" else 30, "test": 6})
    if "relu" in recipe:
        stand_ins.with_relu(folder / "bert")
        stand_ins.with_relu(folder / "vit")
    small = [*SMALL_CLASSIFIER, *(SMALL_SELECTION if last == "expert_selection" else [])]
    own = ["data.init_args.augmentation.mixup=0.8"] if recipe == "d2dmoe_vit_pets" else []
    if recipe.startswith("cifar10"):
        small += [f"fine_tuning.model.init_args.source.init_args.{each}" for each in ("embed_dim=32", "depth=2")]
    if last == "budget_calibration":  # small models do not go far down
        sweep = '[{"class_path": "TauSweep", "init_args": {"budgets": [0.99, 1.0]}}]'
        own = [f"{last}.trainer.callbacks={sweep}", "stand_in_fitting.model.init_args.rank=1"]
        own += [
            f"{last}.model.init_args.{setting}" for setting in ("num_samples=16", "num_scored_points=2", "keep=0.2")
        ]
    main([*commands(recipe)[-1], *small, *own])
    artifact = read_artifact(folder / "runs" / recipe / last / "artifact")
    assert artifact.stage == "routed"
    assert json.loads((artifact.path / "config.json").read_text()).get("hidden_act", "relu") == "relu"
    assert all("test/accuracy" in record.metrics for record in artifact.history)
    assert {made["num_experts"] for made in artifact.layers.values()} == {8}
    assert len((artifact.path.parent / "tau_sweep.csv").read_text().splitlines()) == 1 + 2 * points


@THOROUGH
@pytest.mark.parametrize("recipe", ["your_text_model", "your_image_model"])
def test_your_own_model(folder, recipe):
    stand_ins.write_emotion(folder / "my", train=90)
    stand_ins.write_images(folder / "my", {"train": 90, "test": 6})
    tiny.tokenizer(folder / "my" / "text_model", stand_ins.WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    transformers.BertModel(tiny.bert_config()).save_pretrained(folder / "my" / "text_model")
    stand_ins.write_vit(folder / "my" / "image_model")
    cheap = ["router_regression.model.init_args.width=4", "stand_in_fitting.model.init_args.rank=2"]
    main([*commands(recipe)[0], "--set", *SMALL_CLASSIFIER, *cheap])
    artifact = read_artifact(folder / "runs" / recipe / "budget_calibration" / "artifact")
    assert artifact.stage == "routed"
    assert artifact.budgets is not None
    assert all("test/accuracy" in record.metrics for record in artifact.history)
    rows = (folder / "runs" / recipe / "router_regression" / "tau_sweep.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 10
    assert (folder / "runs" / recipe / "report.html").is_file()


@pytest.mark.parametrize("recipe", ["minilm_emotion_dense", "cifar10_vit_dense"])
def test_dense_models_that_are_trained_on(folder, recipe):
    stand_ins.write_emotion(folder / "emotion")
    stand_ins.write_images(folder / "cifar10", {"train": 30, "test": 6})
    main([*commands(recipe)[-1], *(setting for setting in SMALL_CLASSIFIER if "clustering" not in setting)])
    artifact = read_artifact(folder / "runs" / recipe / "further_training" / "artifact")
    assert artifact.stage == "dense"
    assert [record.phase for record in artifact.history] == ["FineTuning", "FineTuning"]
    assert all("test/accuracy" in record.metrics for record in artifact.history)


@THOROUGH
def test_images_with_attention_projections(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    stand_ins.write_imagenet(tmp_path / "vit.safetensors", tmp_path / "imagenet")
    main([*commands("d2dmoe_vit_imagenet")[-1], *SMALL_IMAGENET])
    artifact = read_artifact(tmp_path / "runs" / "d2dmoe_vit_imagenet" / "router_regression" / "artifact")
    assert artifact.stage == "routed"
    assert len(artifact.layers) == 2 * (1 + 4)  # of each block, the FFN and four projections


def test_squad_2(folder):
    stand_ins.write_squad(folder / "squad", answerless=lambda i: i % 4 == 1)
    _, version_2, local = commands("moebert_squad")
    table_7 = commented("moebert_squad", indent="  ")[1:]
    main([*version_2, *local[local.index("--set") + 1 :], *table_7, *SMALL_SQUAD])
    artifact = read_artifact(folder / "runs" / "moebert_squad_v2" / "moebert_distillation" / "artifact")
    assert {"test/best_f1", "test/no_answer_accuracy"} <= set(artifact.history[-1].metrics)


def refused(capsys, *args):
    """The line that a command ends in, having written nothing."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    said = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "Traceback" not in said
    assert not Path("runs").exists()
    return said.strip().splitlines()[-1]


def test_hub_names_that_cannot_be_reached(folder, capsys):
    hub, local = commands("moebert_mnli")
    nowhere = "fine_tuning.model.init_args.source.init_args.name=nobody/nothing"
    assert refused(capsys, *hub, "--set", nowhere).startswith(
        "error: name='nobody/nothing': neither a folder nor a reachable hub name ("
    )
    assert refused(capsys, *local, "data.init_args.tokenizer=nobody/nothing").startswith(
        "error: tokenizer='nobody/nothing': neither a folder nor a reachable hub name ("
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [f"{DISTILLATION}.num_shared=13"],
            "num_shared=13: must lie in [0, expert_dim], which is 12, the neurons that an expert holds",
        ),
        (
            [f"{DISTILLATION}.num_experts=8"],
            "num_experts=8, expert_dim=12, num_shared=5: need 61 neurons (num_shared + num_experts * (expert_dim - "
            "num_shared)), but bert.encoder.layer.0.intermediate has 48",
        ),
        (
            [f"{DISTILLATION}.hash_list_file=short.pkl"],
            "hash_list_file='short.pkl': has 39 entries; must have one for each of the 40 token ids",
        ),
        (
            [f"{DISTILLATION}.hash_list_file=class.pkl"],
            "hash_list_file='class.pkl': the pickle asks for collections.OrderedDict; allowed are plain lists, dicts, "
            "tuples, numbers and strings, and NumPy's numbers and arrays of them",
        ),
        (
            [f"{DISTILLATION}.importance_file=class.pkl"],
            "importance_file='class.pkl': the pickle asks for collections.OrderedDict; allowed are plain lists, dicts, "
            "tuples, numbers and strings, and NumPy's numbers and arrays of them",
        ),
        (
            ["fine_tuning.model.init_args.source.init_args.task=question-answering"],
            "head='question-answering' of BertForQuestionAnswering: the data needs a model with head 'classification' "
            "(the source decides it, e.g. HuggingFaceModel by its task)",
        ),
        (
            ["data.init_args.name=stsb"],
            "head='classification' of BertForSequenceClassification: the data needs a model with head 'regression' "
            "(the source decides it, e.g. HuggingFaceModel by its task)",
        ),
        (
            ["fine_tuning.model.init_args.source.init_args.task=image-classification"],
            "task='image-classification': transformers has no such head for a model of type 'bert'",
        ),
        (
            [f"{DISTILLATION}.teacher=wide"],
            "teacher='wide': is a bert of 2 layers of width 32; must be a bert of 2 layers of width 24, as the student "
            "is",
        ),
        (
            [f"{DISTILLATION}.teacher=deep"],
            "teacher='deep': is a bert of 3 layers of width 24; must be a bert of 2 layers of width 24, as the student "
            "is",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_ends_in_one_line_before_anything_runs(folder, capsys, settings, message):
    for name, value in (("short", [0] * 39), ("class", collections.OrderedDict())):
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(value))
    for name, shape in (("wide", {"hidden_size": 32}), ("deep", {"num_hidden_layers": 3})):
        teacher = HuggingFaceModel("text-classification", config=tiny.bert_config(**shape)).build(tiny.LABELS)
        save_artifact(teacher, folder / name, [PhaseRecord("FineTuning")])
    assert refused(capsys, *commands("moebert_mnli")[-1], *SMALL, *settings) == f"error: {message}"
