"""Finished runs are evaluated by their folders, and left as they are."""

import hashlib
import shutil
from pathlib import Path

import pytest
import stand_ins
import yaml
from recipe import arguments, write_recipe

from d2dmoe_pl.cli import main
from d2dmoe_pl.run_folders import finished_run


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    main(arguments(write_recipe(folder / "recipe.yaml"), folder / "run"))
    return folder / "run"


def contents(folder):
    """What is in every file of a run, but for its evaluations."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and "evaluations" not in file.parts]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.thorough
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluations_leave_the_run_as_it_is(chain, capsys, subcommand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(chain)
    run = chain / "router_regression"
    for given in (["--run", str(run)], [f"--run={chain}"], ["--config", str(run / "config.yaml")]):
        main([subcommand, *given, "--trainer.enable_progress_bar=false"])
        said = capsys.readouterr().out
        assert subcommand == "predict" or "accuracy" in said
    assert contents(chain) == before
    if subcommand != "predict":
        assert len(list((run / "evaluations").rglob("tau_sweep.csv"))) >= 3


def test_what_is_evaluated_is_what_the_run_left(chain, capsys):
    main(["test", "--run", str(chain / "fine_tuning"), "--trainer.enable_progress_bar=false"])
    record = (chain / "fine_tuning" / "artifact" / "config.json").read_text()
    said = capsys.readouterr().out
    accuracy = next(line.split()[-1] for line in said.splitlines() if "test/accuracy" in line)
    assert f'"test/accuracy": {accuracy[:5]}' in record


def test_other_settings_change_an_evaluation(chain, capsys):
    more = ["--trainer.limit_test_batches=1", "--data.init_args.batch_size=5", "--trainer.enable_progress_bar=false"]
    main(["test", "--run", str(chain / "fine_tuning"), *more])
    assert "test/accuracy" in capsys.readouterr().out


def test_the_last_finished_phase_of_a_chain(chain, tmp_path):
    assert finished_run(str(chain)) == chain / "router_regression"
    assert finished_run(str(chain / "fine_tuning")) == chain / "fine_tuning"


def test_what_a_chain_that_is_redone_has_left_behind_is_none(chain, tmp_path):
    copy = shutil.copytree(chain, tmp_path / "run")
    for config in copy.glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(chain), str(copy)))
    assert finished_run(str(copy)) == copy / "router_regression"
    shutil.rmtree(copy / "sparsity_enforcement" / "artifact")  # redone from there, and interrupted
    assert finished_run(str(copy)) == copy / "fine_tuning"


def test_what_an_earlier_recipe_has_left_is_none(chain, tmp_path, capsys):
    """Its last phase is given another name, is taken out, and comes back."""
    output = shutil.copytree(chain, tmp_path / "run")
    for file in output.glob("*/*.*"):
        if file.suffix in (".yaml", ".json"):
            file.write_text(file.read_text().replace(str(chain), str(output)))
    given = yaml.safe_load(Path(write_recipe(tmp_path / "recipe.yaml")).read_text())
    last = given["phases"].pop("router_regression")

    def run(name, phases):
        recipe = tmp_path / name
        recipe.write_text(yaml.safe_dump({**given, "phases": phases}, sort_keys=False))
        main(arguments(str(recipe), output))
        return capsys.readouterr().err

    assert "no longer" not in run("as_before.yaml", {**given["phases"], "router_regression": last})
    said = run("renamed.yaml", {**given["phases"], "a_router": last})
    assert f"router_regression: no longer in the recipe, left as it is ({output / 'router_regression'})" in said
    assert (output / "router_regression" / "artifact").is_dir()
    assert finished_run(str(output)) == output / "a_router"
    assert ">a_router<" in (output / "report.html").read_text()

    said = run("shorter.yaml", given["phases"])
    assert "Nothing to do" in said
    assert "a_router: no longer in the recipe" in said
    assert finished_run(str(output)) == output / "expert_clustering"
    report = (output / "report.html").read_text()
    assert "expert_clustering" in report
    assert "a_router" not in report

    run("as_before.yaml", {**given["phases"], "router_regression": last})
    assert finished_run(str(output)) == output / "router_regression"

    (output / "chain.json").unlink()  # as an earlier version left it: nothing says which is the last
    with pytest.raises(SystemExit):
        main(["test", "--run", str(output)])
    said = f"error: run='{output}': a_router and router_regression are finished, none behind another; must be"
    assert said in capsys.readouterr().err


def test_a_chain_that_is_redone_from_its_first_phase(chain, tmp_path, capsys):
    copy = shutil.copytree(chain, tmp_path / "run")
    for config in copy.glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(chain), str(copy)))
    shutil.rmtree(copy / "fine_tuning")
    assert finished_run(str(copy)) == copy / "router_regression"  # to make room
    (copy / ".redo.json").write_text('{"from": "fine_tuning"}')
    with pytest.raises(SystemExit):
        main(["test", "--run", str(copy)])
    assert f"error: run='{copy}': no finished phase" in capsys.readouterr().err


def test_a_chain_that_has_been_moved_and_copied(chain, tmp_path, monkeypatch, caplog):
    """From another working folder, with other times, and without what was where it was made."""
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.chdir(made)
    shutil.copytree(chain, "run")
    for config in Path("run").glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(chain), "run"))
    moved = tmp_path / "moved"
    moved.mkdir()
    for phase in sorted(Path("run").iterdir()):  # the last of a chain need not be the youngest
        if phase.is_dir():
            shutil.copytree(phase, moved / phase.name, copy_function=shutil.copyfile)
    shutil.rmtree("run")
    monkeypatch.chdir(tmp_path)
    assert finished_run(str(moved)) == moved / "router_regression"
    before = contents(moved)
    caplog.set_level("INFO")
    main(["test", "--run", str(moved), "--trainer.enable_progress_bar=false"])
    assert f"{moved / 'router_regression'} is evaluated, the last phase of {moved} that is finished." in caplog.messages
    assert contents(moved) == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["made", "moved"]
    assert list(made.iterdir()) == []
    assert list((moved / "router_regression" / "evaluations").rglob("tau_sweep.csv"))


def test_no_run(tmp_path, capsys):
    for given in (str(tmp_path), "/nowhere"):
        with pytest.raises(SystemExit):
            main(["test", "--run", given])
        assert f"error: run='{given}': no finished phase; must be the folder of one" in capsys.readouterr().err


def test_a_phase_that_begins_from_no_source(chain, tmp_path, capsys):
    """As BudgetCalibration and StandInFitting do, whose settings know none."""
    run = tmp_path / "run"
    shutil.copytree(chain / "router_regression", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] = {"class_path": "BudgetCalibration", "init_args": {"init_from": str(run / "artifact")}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--run", str(run), "--trainer.enable_progress_bar=false"])
    assert "test/accuracy" in capsys.readouterr().out


@pytest.fixture(scope="module")
def from_files(tmp_path_factory):
    """Where a chain was made from data and a tokenizer by relative paths."""
    home = tmp_path_factory.mktemp("home")
    stand_ins.write_bert(home / "bert")
    stand_ins.write_emotion(home / "texts")
    model = {"class_path": "HuggingFaceModel", "init_args": {"task": "text-classification", "name": "bert"}}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 1}
    data = {"source": {"dataset": "texts", "train": "texts/train.csv"}, "tokenizer": "bert"}
    recipe = {
        "shared": {
            "data": {"class_path": "TextClassification", "init_args": {**data, "max_length": 12, "batch_size": 8}},
            "trainer": {**trainer, "enable_progress_bar": False, "enable_model_summary": False},
        },
        "phases": {"fine_tuning": {"model": {"class_path": "FineTuning", "init_args": {"source": model}}}},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        main(arguments("recipe.yaml", Path("run")))
    return home


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_paths_that_were_relative_to_another_folder(from_files, subcommand, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = from_files / "run" / "fine_tuning"
    settings = {
        "data.init_args.source.dataset": "texts",
        "data.init_args.source.train": "texts/train.csv",
        "data.init_args.tokenizer": "bert",
    }
    given = ["--trainer.enable_progress_bar=false"]
    for setting, path in settings.items():
        for of_run in (["--run", str(run)], ["--config", str(run / "config.yaml")]):
            with pytest.raises(SystemExit) as exit_info:
                main([subcommand, *of_run, *given])
            assert exit_info.value.code == 2
            told = (
                f"{setting.rpartition('.')[2]}='{path}': is not here, but {run} was made from it; must be started in "
            )
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last == f"error: {told}the folder where that was, or be given --{setting}"
        given.append(f"--{setting}={from_files / path}")
    main([subcommand, "--run", str(run), *given])
    (tmp_path / "predictions.csv").unlink(missing_ok=True)
    monkeypatch.chdir(from_files)
    main([subcommand, "--run", "run", given[0]])
