"""A chain that is killed outright anywhere, and run again, ends bit-equal to one that was not, and leaves no litter."""

import json
from pathlib import Path

import forked_commands
import pytest

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "number"), [("digits", 5), ("texts", 5), ("budgets", 5)])
def test_killed_and_run_again(kind, number):
    """At points drawn by a seed; ``python tests/kill_points.py KIND 0 0`` takes all of a kind."""
    done = forked_commands.run([kind, str(number), "1"], script=str(SCRIPT))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == number
    assert found["wrong"] == {}
