"""What is said at once, without importing what a run needs."""

import os
import subprocess
import sys

import pytest

from d2dmoe_pl.cli import OWN, D2DMoECLI
from d2dmoe_pl.cli import main as whole
from d2dmoe_pl.entry import USAGE, main


def test_help_names_every_command():
    names = [*OWN, *D2DMoECLI.subcommands()]
    assert all(f"\n    {name} " in USAGE for name in names)


@pytest.mark.parametrize(("given", "said"), [((), USAGE), (("--help",), USAGE), (("--version",), "d2dmoe_pl 0.")])
def test_it_is_said(capsys, given, said):
    main(given)
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("given", [["--help"], ["--version"], ["chain", "--help"], ["benchmark", "--help"]])
def test_nothing_heavy_is_imported_for_it(given):
    code = "import sys; from d2dmoe_pl.entry import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert ran.stdout.split()[-1] == "False", ran.stderr


def test_a_typo_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["chian"])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")


@pytest.mark.parametrize("command", list(OWN))
def test_help_at_once_has_the_options_of_the_whole_command_line(capsys, command):
    main([command, "--help"])
    at_once = capsys.readouterr().out
    with pytest.raises(SystemExit):
        whole([command, "--help"])
    options = {word.strip("[]") for word in capsys.readouterr().out.split() if word.lstrip("[").startswith("--")}
    assert len(options) > 5
    assert options - {word.strip("[]") for word in at_once.split()} <= {"--data.help"}


@pytest.mark.parametrize("command", list(OWN))
def test_a_percentage_in_help_can_be_typed_as_it_stands(capsys, command):
    main([command, "--help"])
    assert "%%" not in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-c", "from d2dmoe_pl.entry import main; main(['--help'])"]
    ran = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_letters_that_a_terminal_has_not_end_no_command():
    code = "from d2dmoe_pl.entry import main; main(['--version']); print('\u2501')"  # of a bar
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.endswith(b"?" + os.linesep.encode())


@pytest.mark.parametrize("recipe", ["digits_vitt", "configs/digits_vitt.yaml"])
def test_a_phase_of_a_recipe_that_is_not_there_is_told_with_those_that_are(capsys, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", f"{recipe}:fine_tuning"])
    assert exit_info.value.code == 2
    start = f"error: {recipe}: no such file; must be a recipe, or the name of one that comes with this: cifar10_vit, "
    assert capsys.readouterr().err.startswith(start)
