"""Half files, a second chain, ``--from``, signals, weights that are no numbers, full disks: what a chain does."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked_commands
import pytest
import torch
from recipe import PHASES, arguments, write_recipe

from d2dmoe_pl import chain_status, whole_files
from d2dmoe_pl.artifact import load_model, read_artifact, save_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import NonFiniteWeightsError
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import FineTuning, RouterRegression, SparsityEnforcement
from d2dmoe_pl.signals import ending_in_order


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe, its finished chain, and what that left in the last phase."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml")
    main(arguments(recipe, folder / "run"))
    return recipe, folder / "run", sweep(folder / "run")


def sweep(output):
    last = output / "router_regression"
    return (last / "tau_sweep.csv").read_text(), (last / "artifact" / "d2dmoe.safetensors").read_bytes()


def broken_off(monkeypatch, recipe, output, owner, step, more=()):
    """Run a chain that an interruption ends at a training step of a phase."""
    original, calls = owner.training_step, []

    def training_step(self, batch, batch_idx):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "training_step", training_step)
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, output, *more))
    assert exit_info.value.code == 130
    return calls


@pytest.mark.thorough
@pytest.mark.parametrize("size", [0, 0.5])
def test_a_checkpoint_that_is_cut_off(whole, tmp_path, monkeypatch, capsys, size):
    recipe, _, expected = whole
    broken_off(monkeypatch, recipe, tmp_path / "run", RouterRegression, 8)
    last = tmp_path / "run" / "router_regression" / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.write_bytes(content[: size if isinstance(size, int) else len(content) // 2])
    main(arguments(recipe, tmp_path / "run"))
    assert "router_regression: last.ckpt cannot be read (" in capsys.readouterr().err
    assert sweep(tmp_path / "run") == expected


@pytest.mark.thorough
def test_the_checkpoint_before_is_taken(whole, tmp_path, monkeypatch, capsys):
    recipe, _, expected = whole
    broken_off(monkeypatch, recipe, tmp_path / "run", RouterRegression, 8)
    folder = tmp_path / "run" / "router_regression" / "checkpoints"
    (folder / "own.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    (folder / "last.ckpt").write_bytes(b"")
    resumed = []
    monkeypatch.setattr(RouterRegression, "on_load_checkpoint", lambda self, checkpoint: resumed.append(checkpoint))
    main(arguments(recipe, tmp_path / "run"))
    assert [checkpoint["epoch"] for checkpoint in resumed] == [0]
    assert sweep(tmp_path / "run")[1] == expected[1]


@pytest.mark.thorough
@pytest.mark.parametrize("text", ["", "[]"])
def test_a_status_that_cannot_be_read(whole, tmp_path, monkeypatch, capsys, text):
    recipe, _, expected = whole
    broken_off(monkeypatch, recipe, tmp_path / "run", RouterRegression, 8)
    (tmp_path / "run" / "router_regression" / "phase.json").write_text(text)
    main(arguments(recipe, tmp_path / "run"))
    assert "router_regression: phase.json cannot be read (" in capsys.readouterr().err
    assert sweep(tmp_path / "run") == expected


def test_left_aside_files_go_and_folders_come_back(tmp_path):
    (tmp_path / ".status.json.partial").write_text("{")
    (tmp_path / ".artifact.partial").mkdir()
    (tmp_path / ".old.discarded").mkdir()
    (tmp_path / ".artifact.previous").mkdir()
    (tmp_path / ".gone.previous").mkdir()
    (tmp_path / "artifact").mkdir()
    whole_files.clean_up(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["artifact", "gone"]


@pytest.mark.thorough
def test_from_with_other_settings_begins_anew(whole, tmp_path, monkeypatch, capsys):
    recipe, _, _ = whole
    output, more = tmp_path / "run", ["--from", "expert_clustering"]
    main(arguments(recipe, output))
    broken_off(monkeypatch, recipe, output, RouterRegression, 8, more)
    main(arguments(recipe, output, *more, "--set", "expert_clustering.model.init_args.num_experts=4"))
    assert "goes on" not in capsys.readouterr().err.partition("Phase 3")[0].rpartition("Interrupted")[2]
    layers = read_artifact(output / "router_regression" / "artifact").layers
    assert {layer["num_experts"] for layer in layers.values()} == {4}


@pytest.mark.thorough
def test_from_goes_on_where_it_was_interrupted(whole, tmp_path, monkeypatch, capsys):
    recipe, _, expected = whole
    output, more = tmp_path / "run", ["--from", "sparsity_enforcement"]
    main(arguments(recipe, output))
    first = (output / "fine_tuning" / "phase.json").stat().st_mtime_ns
    steps = broken_off(monkeypatch, recipe, output, SparsityEnforcement, 8, more)
    steps = broken_off(monkeypatch, recipe, output, RouterRegression, 8, more)
    redone = (output / "sparsity_enforcement" / "phase.json").stat().st_mtime_ns
    capsys.readouterr()
    main(arguments(recipe, output, *more))
    said = capsys.readouterr().err
    assert "What was begun to be redone from sparsity_enforcement on goes on." in said
    assert "router_regression: continues" in said
    assert len(steps) == 8
    assert (output / "fine_tuning" / "phase.json").stat().st_mtime_ns == first
    assert (output / "sparsity_enforcement" / "phase.json").stat().st_mtime_ns == redone
    assert sweep(output) == expected
    main(arguments(recipe, output, *more))  # it was finished: this redoes it
    assert (output / "sparsity_enforcement" / "phase.json").stat().st_mtime_ns != redone
    assert not list(output.rglob(".*"))


@pytest.mark.thorough
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_of_the_real_command(tmp_path, signum, code):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    chain = arguments(recipe, output, "--set", "fine_tuning.trainer.max_epochs=400")
    command = [sys.executable, "-m", "d2dmoe_pl", *chain]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    deadline = time.monotonic() + 120
    while not (output / "fine_tuning" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Interrupted in fine_tuning. The same command goes on from there." in said
    assert "Traceback" not in said
    assert not list(output.rglob(".*"))


def test_signals_end_a_body_once_and_are_given_back():
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def body():
        with ending_in_order():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(SystemExit) as exit_info:
        body()
    assert exit_info.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


class TestNonFinite:
    def test_the_last_step_included(self, tmp_path, monkeypatch, capsys):
        recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
        original = FineTuning.training_step

        def training_step(self, batch, batch_idx):
            loss = original(self, batch, batch_idx)
            if self.global_step == 11:  # the last
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss

        monkeypatch.setattr(FineTuning, "training_step", training_step)
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, output))
        assert exit_info.value.code == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: model.")
        assert "the weights of FineTuning at step 12 hold NaN or infinity; stopped, the last good checkpoint is" in said
        assert not (output / "fine_tuning" / "artifact").exists()
        good = torch.load(output / "fine_tuning" / "checkpoints" / "last.ckpt", weights_only=True)
        assert all(torch.isfinite(value).all() for value in good["state_dict"].values())

    def test_of_an_artifact(self, whole, tmp_path):
        model = load_model(whole[1] / "router_regression" / "artifact")
        name, layer = next(iter(moe_layers(model).items()))
        layer.experts.up_weight.data[0, 0, 0] = float("inf")
        with pytest.raises(NonFiniteWeightsError, match=rf"^{name}\.experts\.up_weight: the weights hold NaN or inf"):
            save_artifact(model, tmp_path / "artifact")
        with pytest.raises(NonFiniteWeightsError, match=r"^a: the tensors of more hold NaN"):
            save_artifact(
                load_model(whole[1] / "fine_tuning" / "artifact"),
                tmp_path,
                tensors={"more": {"a": torch.tensor(torch.nan)}},
            )


@pytest.mark.thorough
@pytest.mark.parametrize("moment", range(1, 32, 10))
def test_a_full_disk(whole, tmp_path, monkeypatch, capsys, moment):
    recipe, _, expected = whole
    calls, output = [], tmp_path / "run"

    def full(file):
        calls.append(None)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(whole_files, "_to_disk", full)
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, output))
    assert exit_info.value.code == 1
    assert "the disk is full" in capsys.readouterr().err
    main(arguments(recipe, output))
    assert sweep(output) == expected
    assert all(json.loads((output / name / chain_status.STATUS).read_text())["finished"] for name in PHASES)
    assert not list(output.rglob(".*"))


def test_the_folder_for_temporary_files_is_not_used(whole, tmp_path, monkeypatch):
    recipe, _, expected = whole
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    main(arguments(recipe, tmp_path / "run"))
    assert sweep(tmp_path / "run") == expected
    assert not Path(tmp_path / "nowhere").exists()


@pytest.mark.thorough
def test_a_clusters_signal_saves_between_steps_and_requeues(tmp_path):
    """SLURM, as far as Lightning sees of it, with an scontrol that notes what it is asked for."""
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    settings = ["--set", "fine_tuning.trainer.max_epochs=60", "trainer.limit_val_batches=0"]
    chain = arguments(recipe, output, *settings)
    (tmp_path / "bin").mkdir()
    asked = tmp_path / "asked"
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "chain", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{key}": value for key, value in job.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = forked_commands.start(chain, **environment)
    folder, deadline = output / "fine_tuning", time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)
    while not asked.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert asked.read_text() == "requeue 7\n"
    (saved,) = folder.glob("hpc_ckpt_*.ckpt")
    (folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    step = torch.load(saved, weights_only=True)["global_step"]
    assert 0 < step < 360
    main(chain)
    assert not list(folder.glob("hpc_ckpt_*.ckpt"))
    main(arguments(recipe, tmp_path / "whole", *settings))
    assert sweep(output) == sweep(tmp_path / "whole")
