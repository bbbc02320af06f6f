"""Chains run, resume after an interruption at any moment, and say what they do."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import forked_commands
import pytest
import yaml
from recipe import PHASES, arguments, write_recipe

from d2dmoe_pl import chain as chains
from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.phases import FineTuning, RouterRegression
from d2dmoe_pl.recipe import read_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A recipe and the output of its chain."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "recipe.yaml")
    main(arguments(recipe, folder / "run"))
    return recipe, folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    recipe, output = finished
    shutil.copytree(output, tmp_path / "run")
    return recipe, tmp_path / "run"


@pytest.fixture(autouse=True)
def _interruptible():
    """Lightning ignores Ctrl-C once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def stamps(output):
    """When each phase's artifact and status were written."""
    return {name: (output / name / "phase.json").stat().st_mtime_ns for name in PHASES if (output / name).exists()}


def statuses(output):
    return {name: json.loads((output / name / "phase.json").read_text())["finished"] for name in PHASES}


def test_a_chain_leaves_every_phases_artifact_and_the_sweep(finished):
    _, output = finished
    stages = [read_artifact(output / name / "artifact").stage for name in PHASES]
    assert stages == ["dense", "dense", "experts", "routed"]
    history = read_artifact(output / "router_regression" / "artifact").history
    assert [record.phase for record in history] == [
        "FineTuning",
        "SparsityEnforcement",
        "ExpertClustering",
        "RouterRegression",
    ]
    assert all({"test/loss", "test/accuracy"} <= set(record.metrics) for record in history)
    assert (output / "router_regression" / "tau_sweep.csv").read_text().count("\n") == 1 + 2 * 3
    assert (output / "router_regression" / "tau_sweep.png").is_file()
    assert statuses(output) == dict.fromkeys(PHASES, True)


def test_run_again_it_does_nothing(copy, capsys):
    recipe, output = copy
    before = stamps(output)
    main(arguments(recipe, output))
    assert stamps(output) == before
    assert "Nothing to do. Redo with --from PHASE" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_sweep_twice_and_another_seed_another(finished, tmp_path):
    recipe, output = finished
    tables = [(output / "router_regression" / "tau_sweep.csv").read_text()]
    for seed in (0, 1):
        main(arguments(recipe, tmp_path / str(seed), "--seed", str(seed)))
        tables.append((tmp_path / str(seed) / "router_regression" / "tau_sweep.csv").read_text())
    assert tables[0] == tables[1] != tables[2]


def test_from_redoes_that_phase_and_those_after_it(copy):
    recipe, output = copy
    before = stamps(output)
    main(arguments(recipe, output, "--from", "expert_clustering"))
    after = stamps(output)
    assert [name for name in PHASES if after[name] != before[name]] == ["expert_clustering", "router_regression"]


def test_a_changed_config_of_a_finished_phase_is_said(copy, capsys):
    recipe, output = copy
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, output, "--set", "sparsity_enforcement.model.init_args.alpha=0.5"))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert len(said) < 800
    assert "sparsity_enforcement: its config has changed since it was finished" in said
    assert "model.init_args.alpha: 0.001 -> 0.5" in said
    assert "--from sparsity_enforcement redoes it" in said
    main(arguments(recipe, output, "--set", "trainer.devices=1", "trainer.log_every_n_steps=2"))
    assert "config has changed" not in capsys.readouterr().err  # of no consequence for the result


MOMENTS = {
    "while training": (FineTuning, "training_step", 9),
    "while saving the artifact": (chains.PhaseCLI, None, None),
    "while testing": (FineTuning, "test_step", 2),
    "before the metrics are recorded": (chains, "record_metrics", 1),
    "while the sweep runs": (RouterRegression, "test_step", 1),
}


@pytest.mark.thorough
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_interrupted_at_any_moment_it_goes_on(tmp_path, monkeypatch, capsys, moment):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    owner, name, call = MOMENTS[moment]
    if name is None:
        from d2dmoe_pl.callbacks import save_artifact as owner  # noqa: PLC0415

        name, call = "save_artifact", 2
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    # Lightning looks at the names of a step's arguments
    interrupted.__signature__ = __import__("inspect").signature(original)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(arguments(recipe, output))
    assert "The same command goes on from there." in capsys.readouterr().err
    finished = [phase for phase in PHASES if (output / phase / "phase.json").exists() and statuses_of(output, phase)]
    before = stamps(output)
    main(arguments(recipe, output))
    after = stamps(output)
    assert all(after[phase] == before[phase] for phase in finished)
    assert statuses(output) == dict.fromkeys(PHASES, True)
    assert (output / "router_regression" / "tau_sweep.csv").read_text().count("\n") == 1 + 2 * 3


def statuses_of(output, name):
    return json.loads((output / name / "phase.json").read_text())["finished"]


def test_an_interrupted_phase_continues_from_its_last_checkpoint(tmp_path, monkeypatch):
    recipe, output = write_recipe(tmp_path / "recipe.yaml", epochs=3), tmp_path / "run"
    original, epochs = FineTuning.training_step, []

    def training_step(self, batch, batch_idx):
        epochs.append(self.current_epoch)
        if len(epochs) == 15:  # in the third epoch
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FineTuning, "training_step", training_step)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(arguments(recipe, output))
    main(arguments(recipe, output))
    assert epochs == [0] * 6 + [1] * 6 + [2] * 3 + [2] * 6


@pytest.mark.thorough
def test_an_interrupted_phase_whose_config_has_changed_starts_over(tmp_path, monkeypatch, capsys):
    recipe, output = write_recipe(tmp_path / "recipe.yaml", epochs=3), tmp_path / "run"
    original, epochs = FineTuning.training_step, []

    def training_step(self, batch, batch_idx):
        epochs.append(self.current_epoch)
        if len(epochs) == 15:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FineTuning, "training_step", training_step)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(arguments(recipe, output))
    main(arguments(recipe, output, "--set", "fine_tuning.model.init_args.warmup=0.5"))
    assert epochs[15:] == [0] * 6 + [1] * 6 + [2] * 6
    assert "its config has changed since it was interrupted; it starts over" in capsys.readouterr().err


@pytest.mark.thorough
def test_killed_outright_it_goes_on(tmp_path):
    """SIGKILL of the command, once its first checkpoint is there."""
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    chain = arguments(recipe, output, "--set", "fine_tuning.trainer.max_epochs=40")
    process = forked_commands.start(chain)
    deadline = time.monotonic() + 120
    while not (output / "fine_tuning" / "checkpoints" / "last.ckpt").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not statuses_of(output, "fine_tuning")
    main(chain)
    assert statuses(output) == dict.fromkeys(PHASES, True)


def test_a_nan_loss_stops_the_chain_and_keeps_what_is_good(tmp_path, monkeypatch, capsys):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    original = FineTuning.task_loss

    def task_loss(self, logits, batch):
        return original(self, logits, batch) * (float("nan") if self.training and self.global_step == 8 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "task_loss", task_loss)
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, output))
    assert exit_info.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: FineTuning: the loss is nan at step 8; stopped, the last good checkpoint is ")
    main(arguments(recipe, output))
    assert statuses(output) == dict.fromkeys(PHASES, True)


def test_print_config_gives_a_whole_recipe_that_can_be_run(finished, tmp_path, capsys):
    recipe, output = finished
    twin = {"extends": recipe, "seed": 3, "phases": {**dict.fromkeys(PHASES), "expert_clustering": {"trainer": {}}}}
    (tmp_path / "twin.yaml").write_text(json.dumps(twin))
    printed = []
    for given in (tmp_path / "twin.yaml", tmp_path / "printed.yaml"):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(str(given), output, "--print_config"))
        assert exit_info.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert read_recipe(tmp_path / "printed.yaml") == {**read_recipe(recipe), "seed": 3, "output_dir": str(output)}
    main(arguments(str(tmp_path / "printed.yaml"), output, "--seed", "0"))
    said = capsys.readouterr().err
    assert "Nothing to do." in said
    assert "config has changed" not in said


def test_a_home_folder_and_other_loggers_beside_its_own(tmp_path, monkeypatch):
    """Lightning says of paths what shells say; what a recipe logs with is no other place for artifacts."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "some")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    write_recipe(recipe, epochs=1)
    content = yaml.safe_load(recipe.read_text())
    own = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv", "name": "own"}}
    content["shared"]["trainer"]["logger"] = own
    content["phases"] = {name: content["phases"][name] for name in PHASES[:2]}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    main(arguments(str(recipe), Path("~/$RUNS")))
    folder = tmp_path / "home" / "some"
    assert read_artifact(folder / "sparsity_enforcement" / "artifact").stage == "dense"
    assert list((folder / "fine_tuning").glob("events.*"))
    assert list((tmp_path / "csv" / "own").rglob("metrics.csv"))
    content["phases"] = {"fine_tuning": content["phases"]["fine_tuning"]}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    main(arguments(str(recipe), tmp_path / "set", "--set", "trainer.logger=CSVLogger", "trainer.logger.save_dir=other"))
    assert read_artifact(tmp_path / "set" / "fine_tuning" / "artifact").stage == "dense"
    assert list((tmp_path / "other").rglob("metrics.csv"))
    assert not (tmp_path / "~").exists()


def test_environment_is_left_alone(finished):
    assert "LOCAL_RANK" not in os.environ
