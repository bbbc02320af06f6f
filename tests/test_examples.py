"""The scripts in examples/ run, and are short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from d2dmoe_pl.artifact import save_artifact

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def run(script, folder, *arguments):
    """What a script prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs(script, tmp_path):
    assert script.read_text().count("\n") <= 40
    assert run(script, tmp_path)


def test_an_artifact_is_served_at_a_tau(tmp_path):
    save_artifact(tiny.routed(), tmp_path / "artifact")
    assert "tensor" in run(ROOT / "examples" / "serve_at_a_tau.py", tmp_path, "artifact", "0.5")
