"""What is said at once, without importing what a run needs."""

import subprocess
import sys

import pytest

from d2dmoe_pl.cli import OWN, D2DMoECLI
from d2dmoe_pl.entry import USAGE, main


def test_help_names_every_command():
    names = [*OWN, *D2DMoECLI.subcommands()]
    assert all(f"\n    {name} " in USAGE for name in names)


@pytest.mark.parametrize(("given", "said"), [((), USAGE), (("--help",), USAGE), (("--version",), "d2dmoe_pl 0.")])
def test_it_is_said(capsys, given, said):
    main(given)
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("given", [["--help"], ["--version"], ["chain", "--help"]])
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
