"""The scripts in examples/ run, and are short."""

from pathlib import Path

import forked_commands
import pytest
import tiny

from d2dmoe_pl.artifact import save_artifact

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script in a folder of its own; what it prints."""
    monkeypatch.chdir(tmp_path)

    def printed(script, *arguments):
        ended = forked_commands.run(arguments, script=str(script))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return printed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs(script, run):
    assert script.read_text().count("\n") <= 40
    assert run(script)


def test_an_artifact_is_served_at_a_tau(tmp_path, run):
    save_artifact(tiny.routed(), tmp_path / "artifact")
    assert "tensor" in run(ROOT / "examples" / "serve_at_a_tau.py", "artifact", "0.5")
