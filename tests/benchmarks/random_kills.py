"""Kill the real command with -9 at random moments, run it again, and compare with a run that was left alone.

    python tests/benchmarks/random_kills.py FOLDER [NUMBER] [FIRST]

Each kill is a line in FOLDER/kills-FIRST.jsonl; those that are there are not done again.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from kill_points import contents, litter, prepare  # noqa: E402 (beside this folder)

from d2dmoe_pl.artifact import load_model  # noqa: E402
from d2dmoe_pl.moe.find_layers import moe_layers  # noqa: E402


def command(chain, output):
    return [sys.executable, "-m", "d2dmoe_pl", *chain, "--output_dir", str(output)]


def run(chain, output, seconds=None):
    """Run the chain, killed after so many seconds; its exit status and how long it took."""
    begun = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command(chain, output), env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode, time.monotonic() - begun


def main():
    folder = Path(sys.argv[1])
    given = [int(each) for each in sys.argv[2:]]
    number, first = (given + [100, 0][len(given) :])[:2]
    chain, names = prepare(folder / f"recipe-{first}", "digits")
    whole = folder / f"whole-{first}"
    run(chain, whole)
    status, seconds = run(chain, folder / f"timed-{first}")
    assert status == 0, status
    expected = contents(whole, names)
    log = folder / f"kills-{first}.jsonl"
    done = {json.loads(line)["kill"] for line in log.read_text().splitlines()} if log.exists() else set()
    for kill in range(first, first + number):
        if kill in done:
            continue
        output = folder / f"killed-{kill}"
        after = random.Random(kill).uniform(0, seconds)
        killed, _ = run(chain, output, after)
        again, _ = run(chain, output)
        gates = all(
            layer.gate is not None for layer in moe_layers(load_model(output / names[-1] / "artifact")).values()
        )
        found = contents(output, names)
        line = {"kill": kill, "after": round(after, 2), "killed": killed, "again": again, "has_gates": gates}
        line |= {"equal": found == expected, "litter": litter(output)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        rmtree(output)


if __name__ == "__main__":
    main()
