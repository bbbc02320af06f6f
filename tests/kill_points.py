"""Chains that are killed at a chosen write or step, in processes that are forked for it, and what they then leave.

Run by ``test_kills.py``; by hand, ``python tests/kill_points.py`` kills at every point of every chain and prints a
table by phase and moment.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import tiny
import torch
import yaml
from matplotlib.figure import Figure
from table_files import ROWS, table, write

import d2dmoe_pl.cli as command

KILLED = 77
RUN = "run"
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 8, "patch_size": 4, "in_chans": 1}


def phase(class_path, epochs=2, **init_args):
    return {"model": {"class_path": class_path, "init_args": init_args}, "trainer": {"max_epochs": epochs}}


def digits_recipe(folder):
    """All phases of D2DMoE, projections and recovery among them; pictures that are augmented by loader processes."""
    source = {"class_path": "TimmModel", "init_args": {"architecture": "vit_tiny_patch16_224", **SIZES}}
    phases = {
        "fine_tuning": phase("FineTuning", source=source, activation="relu"),
        "attention_distillation": phase("AttentionDistillation", projections=["output"]),
        "sparsity_enforcement": phase("SparsityEnforcement"),
        "expert_clustering": phase("ExpertClustering", 1, num_experts=8, num_projection_experts=2, num_samples=200),
        "router_regression": phase("RouterRegression", 3, width=4),
        "recovery_tuning": phase("RecoveryTuning"),
    }
    best = {"monitor": "validation/loss", "filename": "best"}
    phases["sparsity_enforcement"]["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best}
    ]
    for each in ("router_regression", "recovery_tuning"):
        sweep = {"class_path": "TauSweep", "init_args": {"taus": [0.5, 1.0]}}
        phases[each]["trainer"]["callbacks"] = [sweep]
    data = {"class_path": "Digits", "init_args": {"batch_size": 64}}
    return data, phases, {"limit_train_batches": 4, "limit_val_batches": 1, "limit_test_batches": 1}


def budgets_recipe(folder):
    """What comes after routers: cutoffs, stand-ins, budgets, the model trained at them, and budgets again."""
    source = {"class_path": "TimmModel", "init_args": {"architecture": "vit_tiny_patch16_224", **SIZES}}
    samples = {"num_samples": 64, "num_scored_samples": 64, "num_scored_points": 3}
    phases = {
        "fine_tuning": phase("FineTuning", 1, source=source, activation="relu"),
        "expert_clustering": phase("ExpertClustering", 1, num_experts=8, num_samples=200),
        "router_regression": phase("RouterRegression", 1, width=4),
        "cutoff_fitting": phase("CutoffFitting", 1, num_tokens=400),
        "stand_in_fitting": phase("StandInFitting", 1, rank=2, num_tokens=400),
        "first_calibration": phase("BudgetCalibration", 1, keep=0.4, **samples),
        "budget_distillation": phase("BudgetDistillation", 7, trains="model", task_weight=0.5),
        "budget_calibration": phase("BudgetCalibration", 1, **samples),
    }
    sweep = {"class_path": "TauSweep", "init_args": {"budgets": [0.5, 1.0]}}
    phases["budget_calibration"]["trainer"]["callbacks"] = [sweep]
    data = {"class_path": "Digits", "init_args": {"batch_size": 64}}
    return data, phases, {"limit_train_batches": 4, "limit_val_batches": 1, "limit_test_batches": 1}


def texts_recipe(folder):
    """MoEBERT: importance and distillation, with dropout."""
    tiny.tokenizer(folder / "tokenizer", "abcxyz")
    for split in ("train", "validation", "test"):
        write(table(), folder / f"{split}.csv")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    source = {
        "class_path": "HuggingFaceModel",
        "init_args": {
            "task": "text-classification",
            "config": {"class_path": "transformers.BertConfig", "init_args": {**shape, "vocab_size": 20}},
        },
    }
    phases = {
        "fine_tuning": phase("FineTuning", source=source),
        "importance_scoring": phase("ImportanceScoring", 1),
        "moebert_distillation": phase(
            "MoEBERTDistillation", num_experts=2, expert_dim=12, num_shared=4, routing="gate_token", gamma=0.1
        ),
    }
    data = {
        "class_path": "TextClassification",
        "init_args": {
            "source": {"dataset": str(folder)},
            "tokenizer": str(folder / "tokenizer"),
            "batch_size": max(1, len(ROWS) // 3),
        },
    }
    return data, phases, {}


RECIPES = {"digits": digits_recipe, "budgets": budgets_recipe, "texts": texts_recipe}


class Points:
    """Moments at which the process can be killed: around each file operation of ours, half-way a write, at a step."""

    def __init__(self, kill_at=None):
        self.kill_at = kill_at
        self.seen = []

    def reach(self, moment):
        self.seen.append(moment)
        if len(self.seen) - 1 == self.kill_at:
            os._exit(KILLED)

    def install(self):
        for owner, name in [(os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")]:
            self._wrap(owner, name)
        self._wrap(torch, "save")
        write_text, points = Path.write_text, self

        def half_written(path, text, *args, **kwargs):
            write_text(path, text[: len(text) // 2], *args, **kwargs)
            points.reach(f"half of {path.name}")
            return write_text(path, text, *args, **kwargs)

        Path.write_text = half_written
        from d2dmoe_pl.phases import Phase  # noqa: PLC0415

        for hook in ("on_train_batch_end", "on_validation_epoch_end", "on_test_epoch_end", "on_fit_end"):
            original = getattr(Phase, hook)

            def reached(own, *args, _original=original, _hook=hook):
                points.reach(_hook)
                return _original(own, *args)

            reached.__signature__ = __import__("inspect").signature(original)
            setattr(Phase, hook, reached)

    def _wrap(self, owner, name):
        original = getattr(owner, name)

        def around(*args, **kwargs):
            self.reach(f"before {name}")
            result = original(*args, **kwargs)
            self.reach(f"after {name}")
            return result

        setattr(owner, name, around)


def prepare(folder, kind):
    """Write the recipe; the arguments of the chain without its output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data, phases, limits = RECIPES[kind](folder)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 2}
    shared = {"data": data, "trainer": {"accelerator": "cpu", "devices": 1, **limits, **quiet}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"shared": shared, "phases": phases}, sort_keys=False))
    return ["chain", "--config", str(folder / "recipe.yaml")], list(phases)


def forked(arguments, log, kill_at=None):
    """Run a chain in a process of its own; its exit status and the moments that it went through, with their phase."""
    read, written = os.pipe()
    pid = os.fork()
    if pid:
        os.close(written)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, json.loads(text) if text else []
    os.close(read)
    code = 0
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    Figure.draw = lambda figure, renderer: None  # ink takes a third of the time
    points = Points(kill_at)
    points.install()
    try:
        command.main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    with contextlib.suppress(BrokenPipeError), os.fdopen(written, "w") as pipe:
        json.dump(points.seen, pipe)
    os._exit(code)


def contents(output, names):
    """What a chain leaves that must be the same to the last bit, by path."""
    files = {}
    for name in names:
        folder = output / name
        for file in [*folder.glob("artifact/**/*"), *folder.glob("*.csv"), folder / "phase.json"]:
            if file.is_file():
                is_status = file.name == "phase.json"
                files[str(file.relative_to(output))] = _computed(file) if is_status else file.read_bytes()
    return files


def _computed(file):
    """A phase's status, but for the time that it took."""
    return {key: value for key, value in json.loads(file.read_text()).items() if key != "seconds"}


def litter(output):
    """Names of files that are of no use to anyone."""
    return sorted(str(file.relative_to(output)) for file in output.rglob(".*"))


def killed_and_run_again(folder, kind, chain, names, expected, points):
    """Kill at each of ``points``, run the same command again; what was wrong, by point."""
    wrong = {}
    for point in points:
        output, log = folder / f"{kind}-{point}", folder / f"{kind}-{point}.log"
        arguments = [*chain, "--output_dir", str(output)]
        status, _ = forked(arguments, log, kill_at=point)
        again, _ = forked(arguments, log)
        found = contents(output, names)
        # the output folder is part of no config that is compared
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if (status, again) != (KILLED, 0) or different or litter(output):
            wrong[point] = [status, again, different, litter(output), log.read_text()[-1500:]]
        shutil.rmtree(output, ignore_errors=True)
    return wrong


def whole(folder, kind):
    """A chain that is not killed: its arguments, phases, contents and moments."""
    chain, names = prepare(folder / kind, kind)
    forked([*chain, "--output_dir", str(folder / "warm")], folder / "warm.log")  # datasets are cached from here on
    output, log = folder / f"{kind}-whole", folder / f"{kind}-whole.log"
    status, moments = forked([*chain, "--output_dir", str(output)], log)
    if status != 0:
        raise RuntimeError(log.read_text()[-3000:])
    return chain, names, contents(output, names), moments


def main():
    """Kill at so many points of a chain, drawn by a seed, or at all; print what was wrong as JSON."""
    kind, number, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chain, names, expected, moments = whole(folder, kind)
        points = list(range(len(moments)))
        if number:
            points = sorted(random.Random(seed).sample(points, min(number, len(points))))
        wrong = killed_and_run_again(folder, kind, chain, names, expected, points)
    kinds = collections.Counter(moments[point] for point in points)
    failed = collections.Counter(moments[point] for point in wrong)
    print(json.dumps({"points": len(moments), "killed": len(points), "kinds": kinds, "failed": failed, "wrong": wrong}))


if __name__ == "__main__":
    main()
