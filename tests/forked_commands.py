"""The command line in processes forked from one that has imported it, since importing takes ten seconds of each."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

MAIN = str(Path(__file__).parents[1] / "main.py")
PATIENCE = 240  # seconds


@dataclass(frozen=True)
class Ended:
    """How a command has ended, and what all its processes have said."""

    returncode: int
    stdout: str
    stderr: str


def start(
    arguments: Sequence[str], script: str = MAIN, stdout: str = os.devnull, stderr: str = os.devnull, **environment: str
) -> BaseProcess:
    """A process that does what ``python script arguments`` does here, its words added to two files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["d2dmoe_pl.cli"])  # each worker of the tests has a process to fork from
    all_of_it = {**os.environ, **environment, "PWD": str(Path.cwd())}
    process = context.Process(target=_run_script, args=(script, list(arguments), stdout, stderr, all_of_it))
    process.start()
    return process


def run(arguments: Sequence[str], processes: int = 1, script: str = MAIN, **environment: str) -> Ended:
    """Run a command to its end, in so many processes as torchrun would start."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        ranks = [{}] if processes == 1 else _ranks(processes)
        started = [start(arguments, script, *files, **environment, **rank) for rank in ranks]
        deadline = time.monotonic() + PATIENCE
        try:
            for process in started:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in started:
                process.kill()  # of no effect on those that have ended
        codes = [process.exitcode for process in started]
        said = [Path(file).read_text() for file in files]
    assert None not in codes, f"{arguments} took more than {PATIENCE} seconds: {said[1][-3000:]}"
    return Ended(next((code for code in codes if code), 0), *said)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests"}
    return [
        {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(processes)
    ]


def _run_script(script: str, arguments: list[str], stdout: str, stderr: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(environment["PWD"])
    for number, file in ((1, stdout), (2, stderr)):
        with open(file, "a") as opened:
            os.dup2(opened.fileno(), number)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
