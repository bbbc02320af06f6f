"""Phases that are done again, by another chain or by ``--from``: what they left before counts for nothing after."""

import json

import pytest
import yaml
from recipe import PHASES, arguments, write_recipe

from d2dmoe_pl import chain
from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.chain_status import LEFT
from d2dmoe_pl.cli import main
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import ExpertClustering, SparsityEnforcement


@pytest.fixture
def short(tmp_path):
    """A function that writes a recipe of the phases up to one, of an epoch each."""

    def write(last):
        recipe = tmp_path / "recipe.yaml"
        write_recipe(recipe, epochs=1)
        content = yaml.safe_load(recipe.read_text())
        content["phases"] = {name: content["phases"][name] for name in PHASES[: PHASES.index(last) + 1]}
        file = tmp_path / f"up_to_{last}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file)

    return write


def interrupted(monkeypatch, owner, hook, chain):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, hook, stop)
        with pytest.raises(SystemExit) as exit_info:
            main(chain)
    assert exit_info.value.code == 130


def test_no_report_is_that_of_an_earlier_run(short, tmp_path, monkeypatch):
    recipe, output = short("fine_tuning"), tmp_path / "run"
    main(arguments(recipe, output))
    before = (output / "report.md").read_text()
    more = ["--from", "fine_tuning", "--set", "fine_tuning.trainer.limit_train_batches=2"]
    interrupted(monkeypatch, chain, "write_report", arguments(recipe, output, *more))
    assert not (output / "report.html").exists()
    main(arguments(recipe, output, *more[2:]))
    assert (output / "report.html").is_file()
    assert (output / "report.md").read_text() != before


def phases_that_start(said):
    return [name for name in PHASES if f"{name}: starts\n" in said]


def test_a_phase_that_another_chain_did_again_is_told_by_what_it_left(short, tmp_path, capsys):
    whole, output = short("sparsity_enforcement"), tmp_path / "run"
    more = ["--set", "fine_tuning.trainer.limit_train_batches=3"]
    main(arguments(whole, output))
    main(arguments(short("fine_tuning"), output, "--from", "fine_tuning"))
    capsys.readouterr()
    (output / "fine_tuning" / "artifact" / "model.onnx").write_text("an export")
    main(arguments(whole, output))  # the same was made once more
    assert "Nothing to do." in capsys.readouterr().err
    main(arguments(short("fine_tuning"), output, "--from", "fine_tuning", *more))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(whole, output, *more))
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "error: sparsity_enforcement: its config has changed since it was finished; --from sparsity_enforcement redoes "
        "it and all that follow, another output_dir keeps both: content of what the phase before it has left: "
    )
    main(arguments(whole, output, *more, "--from", "sparsity_enforcement"))
    main(arguments(whole, output, *more))
    assert "Nothing to do." in capsys.readouterr().err


@pytest.mark.thorough
def test_a_phase_that_was_interrupted_does_not_go_on_from_another_start(short, tmp_path, monkeypatch, capsys):
    whole, output = short("sparsity_enforcement"), tmp_path / "run"
    more = ["--set", "fine_tuning.trainer.limit_train_batches=3"]
    interrupted(monkeypatch, SparsityEnforcement, "on_test_start", arguments(whole, output))
    main(arguments(short("fine_tuning"), output, "--from", "fine_tuning", *more))
    capsys.readouterr()
    main(arguments(whole, output, *more))
    said = capsys.readouterr().err
    assert "sparsity_enforcement: its config has changed since it was interrupted; it starts over. content of " in said


def test_what_an_earlier_version_noted_less_of_is_finished(short, tmp_path, capsys):
    whole, output = short("sparsity_enforcement"), tmp_path / "run"
    main(arguments(whole, output))
    file = output / "sparsity_enforcement" / "phase.json"
    status = json.loads(file.read_text())
    del status["config"][LEFT]
    file.write_text(json.dumps(status))
    main(arguments(whole, output))
    assert "Nothing to do." in capsys.readouterr().err


@pytest.mark.thorough
def test_redone_with_later_phases_changed_too_it_goes_on(short, tmp_path, monkeypatch, capsys):
    recipe, output = short("router_regression"), tmp_path / "run"
    main(arguments(recipe, output))
    settings = ["--set", "fine_tuning.trainer.limit_train_batches=3", "router_regression.model.init_args.width=5"]
    chain = arguments(recipe, output, "--from", "fine_tuning", *settings)
    interrupted(monkeypatch, ExpertClustering, "training_step", chain)
    capsys.readouterr()
    main(chain)
    said = capsys.readouterr().err
    assert "What was begun to be redone from fine_tuning on goes on." in said
    assert "expert_clustering: continues\n" in said
    assert phases_that_start(said) == ["router_regression"]
    model = load_model(output / "router_regression" / "artifact")
    assert {layer.get_router().config.width for layer in moe_layers(model).values()} == {5}
    main(arguments(recipe, output, *settings))
    assert "Nothing to do." in capsys.readouterr().err


@pytest.mark.parametrize("renamed", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_phase_that_is_put_before_finished_ones_discards_none_of_them_unasked(short, tmp_path, capsys, renamed):
    recipe, output = short("sparsity_enforcement"), tmp_path / "run"
    main(arguments(recipe, output))
    with open(recipe) as file:
        content = yaml.safe_load(file)
    first, second = content["phases"].values()
    before = {"tuning": first} if renamed else {"fine_tuning": first, "sparser": second}
    content["phases"] = {**before, "sparsity_enforcement": second}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content, sort_keys=False))
    artifact = output / "sparsity_enforcement" / "artifact" / "model.safetensors"
    left = artifact.stat().st_mtime_ns
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(str(other), output))
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    now = "tuning" if renamed else "sparser"
    assert last.startswith(
        f"error: sparsity_enforcement: was finished behind fine_tuning, and would be done again behind {now};"
    )
    assert artifact.stat().st_mtime_ns == left
    main(arguments(str(other), output, "--from", "sparsity_enforcement"))
    assert artifact.stat().st_mtime_ns != left
