"""What no folder is named by is told before files go to wherever a command was started."""

import pytest
import tiny
from recipe import write_recipe

from d2dmoe_pl import compress
from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError

COMMANDS = {
    "chain": ["chain", "--config", "recipe.yaml", "--output_dir"],
    "compress": ["compress", "--output_dir"],
    "benchmark": ["benchmark", "--scope", "layer", "--output_dir"],
    "fit": ["fit", "--config", "recipe.yaml:fine_tuning", "--trainer.default_root_dir"],
}


@pytest.mark.parametrize("given", ["", " ", "$OF_A_SCRIPT"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_name_of_a_folder_ends_in_one_line(command, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_A_SCRIPT", "")
    write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(SystemExit) as exit_info:
        main([*COMMANDS[command], given])
    assert exit_info.value.code == 2
    argument = COMMANDS[command][-1].removeprefix("--").removeprefix("trainer.")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"error: {argument}='{given}': must be a folder's name; . is the one you are in"
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_empty_name_in_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^path='': must be a folder's name$"):
        save_artifact(tiny.dense(), "")
    with pytest.raises(ConfigError, match=r"^output_dir='': must be a folder's name; "):
        compress(tiny.dense(), "data.csv", output_dir="")
    assert not any(tmp_path.iterdir())
