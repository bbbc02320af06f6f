"""What a chain refuses ends in one line, before anything is written."""

import pytest
import yaml
from recipe import PHASES, arguments, write_recipe

from d2dmoe_pl.cli import main


def test_a_finished_phase_whose_artifact_is_broken(tmp_path, capsys):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    main(arguments(recipe, output))
    weights = output / "fine_tuning" / "artifact" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, output))
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: finished phase fine_tuning=")
    assert "model.safetensors is missing or truncated" in last


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        (
            {"expert_clustering": {"num_experts": 5}},
            [],
            "num_experts=5: must divide the FFN width, which is 64 in blocks.0.mlp",
        ),
        ({"router_regression": {"tau": 1.5}}, [], "tau=1.5: must lie in [0, 1]"),
        ({"fine_tuning": {"activation": None}}, [], "penalty='hoyer' with displacement=None: allowed only on ReLU"),
        ({"fine_tuning": {"activation": "quark"}}, [], "activation='quark': timm knows no such activation"),
        ({}, ["--from", "fine_tunning"], "from='fine_tunning': allowed are fine_tuning, sparsity_enforcement"),
        ({}, ["--set", "epochs=3"], "set='epochs=3': must look like trainer.max_epochs=1"),
        (
            {},
            ["--set", "router.width=3"],
            "set='router.width=3': must begin with trainer, data or model, or with a phase",
        ),
        ({}, ["--set", "trainer.max_epoch=3"], "max_epoch"),
        ({"router_regression": {"wdith": 3}}, [], "wdith"),
    ],
)
def test_a_wrong_config_ends_in_one_line_and_leaves_no_files(tmp_path, capsys, models, more, message):
    recipe = write_recipe(tmp_path / "recipe.yaml", **models)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(recipe, tmp_path / "run", *more))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert message in "\n".join(said.strip().splitlines()[-4:])
    assert not (tmp_path / "run").exists()


def test_two_phases_of_one_name(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("phases:\n  a: {}\n  b: {}\n  a: {}\n")
    with pytest.raises(SystemExit):
        main(arguments(str(recipe), tmp_path / "run"))
    assert capsys.readouterr().err == f"error: {recipe}: a: is in line 2 and in line 4\n"


def test_no_phases(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["chain", "--output_dir", str(tmp_path / "run"), "--phases", "{}"])
    assert capsys.readouterr().err == "error: phases={}: must be at least one\n"


class TestTooLittleDataForALaterPhase:
    @staticmethod
    def run(tmp_path, capsys, **settings):
        recipe = write_recipe(tmp_path / "recipe.yaml", epochs=1)
        content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
        model = {"class_path": "BudgetCalibration", "init_args": {"num_samples": 5}}
        content["phases"]["budgets"] = {"model": model, **settings}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(recipe, tmp_path / "run"))
        assert exit_info.value.code == 2
        expected = "error: num_samples=5: 5 validation samples are too few; 2 layers need at least 8"
        assert capsys.readouterr().err.strip().splitlines()[-1] == expected
        return [name for name in [*PHASES, "budgets"] if (tmp_path / "run" / name / "artifact").exists()]

    def test_is_told_before_the_first_trains(self, tmp_path, capsys):
        assert self.run(tmp_path, capsys, data={"init_args": {"batch_size": 32}}) == []

    def test_of_data_of_its_own_when_that_is_read(self, tmp_path, capsys):
        assert self.run(tmp_path, capsys, data={"init_args": {"augment": False}}) == PHASES
