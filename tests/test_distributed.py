"""Two processes on one machine give what one gives: chains under DDP and under torchrun, scores and hash tables."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import forked_commands
import pytest
import stand_ins
import tiny
import torch
import yaml
from forked_commands import MAIN
from recipe import PHASES, arguments, write_recipe
from safetensors.torch import load_file

from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.moebert.routing import random_table

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

OPTIMIZER = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
TWO = ["--set", "trainer.devices=2", "trainer.strategy=ddp", "data.init_args.batch_size=32"]


def run(command):
    """Run a command in two processes; what they say."""
    ended = forked_commands.run(command, processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stderr


def run_as_users_do(command):
    """The same with all that starts and imports, by torchrun or by Lightning."""
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]


def sweep(folder):
    with (folder / "tau_sweep.csv").open() as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A recipe and its chain, run by one process."""
    folder = tmp_path_factory.mktemp("distributed")
    recipe = write_recipe(folder / "recipe.yaml", epochs=3)
    main(arguments(recipe, folder / "one"))
    return recipe, folder / "one"


@pytest.fixture(scope="module")
def two_processes(one_process, tmp_path_factory):
    """The clustering, routing and sweep of two processes, from the dense model of one; torn off and run again."""
    recipe, one = one_process
    two = tmp_path_factory.mktemp("two") / "run"
    # the same dense model, so that what follows can be compared
    for phase in PHASES[:2]:
        (two / phase).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(one / phase), str(two / phase)], check=True)
    status = (two / "fine_tuning" / "phase.json").read_text()
    for phase in PHASES[:2]:
        file = two / phase / "phase.json"
        file.write_text(file.read_text().replace('"data.init_args.batch_size": 64', '"data.init_args.batch_size": 32'))
    assert status != (two / "fine_tuning" / "phase.json").read_text()
    said = run(arguments(recipe, two, *TWO))
    return two, said


@pytest.mark.thorough
def test_clustering_gives_the_numbers_of_one_process(one_process, two_processes):
    name = "expert_clustering/artifact/d2dmoe.safetensors"
    one, two = load_file(one_process[1] / name), load_file(two_processes[0] / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.thorough
def test_coactivation_split_gives_that_of_one_process(one_process, tmp_path):
    recipe, one = one_process
    common = [
        f"--config={recipe}:expert_clustering",
        "--model.init_args.split=coactivation",
        f"--model.init_args.init_from={one / 'sparsity_enforcement' / 'artifact'}",
    ]
    main(["fit", *common, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=20"]
    run(["fit", *common, *more, f"--trainer.default_root_dir={tmp_path / 'two'}"])
    name = "lightning_logs/version_0/artifact/d2dmoe.safetensors"
    tensors = [load_file(tmp_path / process / name) for process in ("one", "two")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_phases_are_run_once_and_said_once(two_processes):
    _, said = two_processes
    assert said.count("sparsity_enforcement: finished") == 1
    assert said.count("Phase 3 of 4: expert_clustering") == 1
    assert said.count("Finished. The model:") == 1


def test_sweep_gives_the_numbers_of_one_process_on_the_same_model(two_processes, tmp_path):
    """400 test samples over 2 processes and batches of 48: the last batches are uneven."""
    artifact = two_processes[0] / "router_regression" / "artifact"
    recipe = write_recipe(tmp_path / "recipe.yaml", epochs=3)
    common = [
        f"--config={recipe}:router_regression",
        f"--model.init_args.init_from={artifact}",
        "--data.init_args.batch_size=48",
    ]
    main(["test", *common, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={tmp_path / 'two'}"]
    run(["test", *common, *more])
    tables = [sweep(tmp_path / name / "lightning_logs" / "version_0") for name in ("one", "two")]
    for one, two in zip(*tables, strict=True):
        for key in one:
            if key == "loss":
                assert float(one[key]) == pytest.approx(float(two[key]), rel=1e-5)
            else:
                assert one[key] == two[key]


@pytest.mark.thorough
def test_a_whole_chain_under_torchrun(one_process, tmp_path):
    recipe, _ = one_process
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = arguments(recipe, tmp_path / "run", *TWO, "trainer.max_epochs=1")
    run_as_users_do([*torchrun, MAIN, *command])
    history = read_artifact(tmp_path / "run" / "router_regression" / "artifact").history
    assert len(history) == 4
    assert all("test/accuracy" in record.metrics for record in history)
    # once more: nothing to do, and it says so from one process only
    said = run(command)
    assert said.count("Nothing to do") == 1


@pytest.mark.thorough
def test_a_whole_chain_under_ddp_from_scratch(one_process, tmp_path):
    recipe, _ = one_process
    cached = [f"router_regression.{setting}" for setting in ("data.init_args.augment=false", "trainer.max_epochs=2")]
    run_as_users_do([MAIN, *arguments(recipe, tmp_path / "run", *TWO, "trainer.max_epochs=1", *cached)])
    accuracies = [row["accuracy"] for row in sweep(tmp_path / "run" / "router_regression")]
    assert len(accuracies) == 6


@pytest.mark.thorough
def test_cutoffs_stand_ins_and_budgets_are_those_of_one_process(one_process, tmp_path):
    recipe, one = one_process
    shared = yaml.safe_load(Path(recipe).read_text())["shared"]
    start = {"init_from": str(one / "router_regression" / "artifact"), "num_tokens": 300}
    calibration = {"num_samples": 120, "num_scored_points": 4, "keep": 0.5}
    phases = {
        "cutoff_fitting": {"model": {"class_path": "CutoffFitting", "init_args": start}},
        "stand_in_fitting": {"model": {"class_path": "StandInFitting", "init_args": {"rank": 4, "num_tokens": 300}}},
        "budget_calibration": {"model": {"class_path": "BudgetCalibration", "init_args": calibration}},
    }
    file = tmp_path / "calibration.yaml"
    file.write_text(yaml.safe_dump({"shared": shared, "phases": phases}, sort_keys=False))
    main(arguments(str(file), tmp_path / "one"))
    run(arguments(str(file), tmp_path / "two", *TWO))
    folders = [tmp_path / name for name in ("one", "two")]
    of_one, of_two = (load_file(each / "stand_in_fitting" / "artifact" / "d2dmoe.safetensors") for each in folders)
    for name in (name for name in of_one if "stand_in" in name):
        assert of_one[name].any()
    for name in (name for name in of_one if "cutoffs" in name):
        torch.testing.assert_close(of_two[name], of_one[name], rtol=0.1, atol=0)
    maps = [
        {
            name: tensors[name.replace("up", "down")].t() @ tensors[name][:-1]
            for name in tensors
            if "stand_in.up" in name
        }
        for tensors in (of_one, of_two)
    ]
    for name, one_map in maps[0].items():  # directions may have other signs, what they make is the same
        torch.testing.assert_close(maps[1][name], one_map, rtol=1e-3, atol=1e-4)
    paths = [read_artifact(each / "budget_calibration" / "artifact").budgets for each in folders]
    assert len(paths[0].points) == len(paths[1].points)
    for point, other in zip(paths[0].points, paths[1].points, strict=True):
        assert point.taus == other.taus
        assert point.ffn_flops == pytest.approx(other.ffn_flops, rel=1e-3)
        assert point.score == pytest.approx(other.score, abs=1)


@pytest.mark.thorough
def test_importance_and_hash_tables_are_those_of_one_process(tmp_path):
    """25 samples over 2 processes: one is repeated, and must count once."""
    stand_ins.write_bert(tmp_path / "bert")
    stand_ins.write_mnli(tmp_path / "mnli")
    model = tiny.dense("bert", "gelu")
    model.config.id2label = dict(enumerate(["entailment", "neutral", "contradiction"]))
    model.save_pretrained(tmp_path / "bert")  # with a head
    pretrained = {"task": "text-classification", "name": str(tmp_path / "bert")}
    source = {"class_path": "HuggingFaceModel", "init_args": pretrained}
    original = Path(__file__).parents[1] / "configs" / "moebert_mnli.yaml"
    steps = ("importance_scoring", "moebert_distillation")
    recipe = tmp_path / "without_fine_tuning.yaml"
    recipe.write_text(json.dumps({"extends": str(original), "phases": dict.fromkeys(steps)}))
    chain = ["chain", "--config", str(recipe), "--output_dir"]
    settings = [
        f"importance_scoring.model.init_args.source={json.dumps(source)}",
        "moebert_distillation.model.init_args.routing=hash_balance",
        "moebert_distillation.trainer.limit_train_batches=1",
        f"data.init_args.tokenizer={tmp_path / 'bert'}",
        f"data.init_args.source.train={tmp_path / 'mnli' / 'train.jsonl'}",
        f"data.init_args.source.validation={tmp_path / 'mnli' / 'validation_matched.jsonl'}",
        f"data.init_args.source.test={tmp_path / 'mnli' / 'validation_mismatched.jsonl'}",
        *stand_ins.SMALL,
    ]
    main([*chain, str(tmp_path / "one"), "--set", *settings])
    two = ["trainer.devices=2", "trainer.strategy=ddp", "data.init_args.batch_size=3"]
    run([*chain, str(tmp_path / "two"), "--set", *settings, *two])
    left = [f"{steps[0]}/artifact/importance.safetensors", f"{steps[1]}/artifact/d2dmoe.safetensors"]
    scores, models = ([load_file(tmp_path / processes / name) for processes in ("one", "two")] for name in left)
    assert scores[0].keys() == scores[1].keys()
    for layer, score in scores[0].items():
        torch.testing.assert_close(score, scores[1][layer], rtol=1e-5, atol=0)
    tables = [{key: value for key, value in model.items() if key.endswith("routing.table")} for model in models]
    assert len(tables[0]) == 2
    for layer, table in tables[0].items():
        assert torch.equal(table, tables[1][layer])
        assert not torch.equal(table, random_table(40, 4, 0))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("phase", "settings", "said"),
    [
        ("RecoveryTuning", {"num_held_out": 1, "optimizer": OPTIMIZER}, "num_held_out=1"),
        ("BudgetCalibration", {"num_samples": 1}, "num_samples=1"),
        ("BudgetCalibration", {"num_scored_samples": 1}, "num_scored_samples=1"),
    ],
)
def test_a_draw_without_a_sample_for_each_process_is_told_before_training(one_process, tmp_path, phase, settings, said):
    recipe, one = one_process
    shared = yaml.safe_load(Path(recipe).read_text())["shared"]
    start = {"init_from": str(one / "router_regression" / "artifact"), **settings}
    file = tmp_path / "draw.yaml"
    phases = {"only": {"model": {"class_path": phase, "init_args": start}}}
    file.write_text(yaml.safe_dump({"shared": shared, "phases": phases}, sort_keys=False))
    ended = forked_commands.run(arguments(str(file), tmp_path / "run", *TWO), processes=2)
    assert ended.returncode == 2
    assert f"error: {said}: 1 samples for 2 processes; must be at least one for each" in ended.stderr
    assert not list((tmp_path / "run").rglob("*.ckpt"))
