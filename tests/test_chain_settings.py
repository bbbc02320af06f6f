"""What a chain is told counts, or ends in a line: by options, by a recipe, and what is for the chain to say."""

from pathlib import Path

import pytest
import yaml
from recipe import arguments, write_recipe

from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.cli import main
from d2dmoe_pl.recipe import merged


@pytest.mark.parametrize(
    ("part", "told", "said"),
    [
        (
            "shared",
            {"seed_everything": 7},
            "fine_tuning.seed_everything=7: is the same for all phases of a chain; must",
        ),
        (
            "expert_clustering",
            {"seed_everything": 9},
            "expert_clustering.seed_everything=9: is the same for all phases",
        ),
        (
            "shared",
            {"trainer": {"default_root_dir": "elsewhere"}},
            "fine_tuning.trainer.default_root_dir='elsewhere': a chain gives each phase the folder of its",
        ),
        (
            "expert_clustering",
            {"model": {"init_args": {"init_from": "other/artifact"}}},
            "expert_clustering.model.init_args.init_from='other/artifact': each phase of a chain but the first begins",
        ),
        (None, {"seed": None}, "seed=None: must lie in [0, 2**32)"),
    ],
)
def test_what_is_for_the_chain_to_say(tmp_path, capsys, part, told, said):
    file, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    overlay = told if part is None else {"shared": told} if part == "shared" else {"phases": {part: told}}
    recipe = merged(yaml.safe_load(Path(file).read_text()), overlay)
    Path(file).write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(SystemExit):
        main(arguments(file, output))
    assert f"error: {said}" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--set", "expert_clustering.model.init_args.init_from=runs/NOWHERE"],
            "expert_clustering.model.init_args.init_from='runs/NOWHERE': each phase of a chain but the first begins",
        ),
        (["--set", "nonsense.key=1", "--set", "trainer.max_epochs=2"], "set='nonsense.key=1': must begin with trainer"),
        (
            ["--shared.trainer.max_epochs=7"],
            "--shared.trainer.max_epochs: would be all that is left of shared; must be",
        ),
        (["--config", "digits_vit"], "config='digits_vit': is a second recipe; must be one, which extends the other"),
    ],
)
def test_nothing_that_is_given_is_passed_over(tmp_path, capsys, more, said):
    recipe, output = write_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    with pytest.raises(SystemExit):
        main([*arguments(recipe, output), *more])
    assert f"error: {said}" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["chain", "--seed_everything", "1"], "--seed_everything: no such setting of chain; must be --seed"),
        (
            ["chain", "--trainer.max_epochs=1"],
            "--trainer.max_epochs: no such setting of chain; must be --set trainer.max_epochs=VALUE",
        ),
        (["chain", "--sed=1"], "--sed: no such setting of chain; did you mean seed or"),
        (
            ["compress", "--trainer.max_epochs", "1"],
            "--trainer.max_epochs: no such setting of compress; compress --help",
        ),
        (["compress", "--batchsize=1"], "--batchsize: no such setting of compress; did you mean batch_size?"),
        (["benchmark", "--thread", "1"], "--thread: no such setting of benchmark; did you mean threads"),
        (["compile", "--artefact", "a"], "--artefact: no such setting of compile; did you mean artifact?"),
    ],
)
def test_a_setting_of_another_subcommand_or_of_none(capsys, given, said):
    with pytest.raises(SystemExit) as exit_info:
        main(given)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (["compress", "--text_columns", "a", "--text_columns=b"], "--text_columns"),
        (["benchmark", "--tau", "0.5", "--device", "cpu", "--tau", "0.7", "--device", "cpu"], "--tau"),
    ],
)
def test_lists_are_given_once(capsys, given, option):
    with pytest.raises(SystemExit):
        main(given)
    said = f"error: {option}: is given 2 times; must be given once, with all of its values\n"
    assert capsys.readouterr().err == said


def test_settings_add_up_those_of_the_recipe_first(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("set: [trainer.max_epochs=1]\nphases: {}\n")
    given = ["--set", "data.workers=1", "trainer.max_epochs=2", "--set", "trainer.max_steps=3"]
    for order in ([f"--config={recipe}", *given], [*given, f"--config={recipe}"]):
        assert chain_parser().parse_args(order).get("set") == ["trainer.max_epochs=1", *(given[1:3]), given[-1]]
