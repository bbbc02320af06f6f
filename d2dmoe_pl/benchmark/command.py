"""``main.py benchmark``: measure, show, and keep what is measured."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.compared_modules import find_way
from d2dmoe_pl.benchmark.comparison import Comparison, Settings, measure
from d2dmoe_pl.benchmark.gguf_runtime import check_gguf
from d2dmoe_pl.benchmark.machine import Machine, this_machine
from d2dmoe_pl.benchmark.result_rows import BenchmarkRow, as_table, draw_speed_up, verdict, write_csv
from d2dmoe_pl.benchmark.runtimes import RUNTIMES, check_runtimes
from d2dmoe_pl.benchmark.shape_comparisons import Shape, shape_comparisons
from d2dmoe_pl.benchmark.timing import NOISE_BOUND
from d2dmoe_pl.benchmark_arguments import AHEAD_OF_TIME, AROUND, DTYPES, SCOPES, benchmark_arguments
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.execution import BACKENDS
from d2dmoe_pl.moe.gating import check_tau
from d2dmoe_pl.whole_files import named_folder

DEVICES = ("auto", "cpu", "cuda")
TABLE_WIDTH = 120
INTERRUPTED = 130  # what shells give a program that Ctrl-C ended


def benchmark_parser() -> ArgumentParser:
    """The arguments of the ``benchmark`` subcommand."""
    return benchmark_arguments(TaskData)


def run_benchmark(config: Namespace) -> None:
    """Measure, and show and keep the rows; those measured before Ctrl-C too.

    Args:
        config: What :func:`benchmark_parser` parsed.

    Raises:
        ConfigError: For a wrong setting.
        SystemExit: After Ctrl-C.
    """
    given = benchmark_parser().instantiate(config)
    folder = named_folder(given.output_dir, "output_dir")
    settings = _settings(given)
    comparisons = _comparisons(given, settings)
    threads = torch.get_num_threads()
    try:
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        _run(comparisons, settings, folder)
    finally:
        torch.set_num_threads(threads)


def _settings(given: Namespace) -> Settings:
    for scope in given.scope:
        check(scope in SCOPES, f"scope={scope!r}: allowed are {', '.join(SCOPES)}")
    for dtype in given.dtype:
        check(dtype in DTYPES, f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    check(given.around in AROUND, f"around={given.around!r}: allowed are {', '.join(AROUND)}")
    for batch_size in given.batch_size:
        check(batch_size > 0, f"batch_size={batch_size}: must be positive")
    for budget in given.budget:
        check(0 < budget <= 1, f"budget={budget:g}: must lie in (0, 1]; 25% is 0.25")
    BACKENDS.find(given.backend, "backend")
    for name in given.compare:
        if name not in RUNTIMES:
            find_way(name)
    check_runtimes(name for name in given.compare if name in RUNTIMES)
    check(given.scored_samples >= 0, f"scored_samples={given.scored_samples}: must be positive, or 0 for none")
    check(given.decode == 0 or given.decode > 1, f"decode={given.decode}: must be at least 2, or 0 for none")
    check(not given.decode or given.artifact is not None, f"decode={given.decode}: only with --artifact; must be 0")
    check(
        not given.decode or "layer" not in given.scope,
        f"decode={given.decode}: only of whole models; leave --scope layer out",
    )
    for name in given.compare:
        is_read = name in RUNTIMES
        check(not (is_read and given.decode), f"compare={name!r}: reads texts, and writes none; must go, or --decode 0")
        needed, runs = ("model", "whole models") if is_read else ("layer", "FFNs alone")
        check(needed in given.scope, f"compare={name!r}: runs {runs}; must go, or --scope {needed} be there")
    check(given.gguf is None or given.decode > 0, f"gguf={given.gguf!r}: only with --decode")
    if given.gguf is not None:
        check_gguf(given.gguf)
    check(given.rounds > 1, f"rounds={given.rounds}: must be at least 2")
    check(given.threads is None or given.threads > 0, f"threads={given.threads}: must be positive")
    check(given.device in DEVICES, f"device={given.device!r}: allowed are {', '.join(DEVICES)}")
    gpu = torch.cuda.is_available()
    check(given.device != "cuda" or gpu, "device='cuda': PyTorch finds no GPU here; allowed are auto, cpu")
    is_on_gpu = gpu and given.device != "cpu"
    if given.optimize == AHEAD_OF_TIME:
        check(not is_on_gpu, f"optimize={AHEAD_OF_TIME!r}: runs on the CPU; must go, or --device cpu be there")
        check(given.artifact is not None, f"optimize={AHEAD_OF_TIME!r}: only with --artifact; must be true or false")
        check(not given.decode, f"optimize={AHEAD_OF_TIME!r}: reads texts, and writes none; must go, or --decode 0")
    check(given.gguf is None or not is_on_gpu, f"gguf={given.gguf!r}: llama.cpp is timed on the CPU; add --device cpu")
    for name in given.compare if is_on_gpu else []:
        is_there = name not in RUNTIMES or name == "compile"
        check(is_there, f"compare={name!r}: runs on the CPU; must go, or --device cpu be there")
    return Settings(
        scope=given.scope,
        dtype=[getattr(torch, dtype) for dtype in given.dtype],
        batch_size=given.batch_size,
        backend=given.backend,
        compare=given.compare,
        rounds=given.rounds,
        device=torch.device("cuda" if is_on_gpu else "cpu"),
        optimize=given.optimize,
        scored_samples=given.scored_samples,
        budgets=given.budget,
        decode=given.decode,
        around=getattr(torch, given.around),
        gguf=given.gguf,
    )


def _comparisons(given: Namespace, settings: Settings) -> Iterator[Comparison]:
    if given.artifact is not None:
        for tau in given.tau:
            check_tau(tau)
        check(given.length > 0, f"length={given.length}: must be positive")
        return artifact_comparisons(given.artifact, given.tau, given.get("data"), given.length, settings)
    check(
        given.get("data") is None,
        f"data={type(given.get('data')).__name__}: only with --artifact; a shape is measured on noise",
    )
    shape = Shape(**{name: given[name] for name in Shape.__dataclass_fields__})
    return shape_comparisons(shape, settings)


def _run(comparisons: Iterator[Comparison], settings: Settings, folder: Path) -> None:
    machine = this_machine(settings.device)
    console = _console()
    console.print(f"Measured on {machine}", highlight=False, soft_wrap=True)
    rows: list[BenchmarkRow] = []
    try:
        for comparison in comparisons:
            measured = measure(comparison, settings.rounds, settings.device)
            rows += measured
            write_csv(rows, machine, folder / "benchmark.csv")
            console.print(as_table(measured), highlight=False)
            said = verdict(measured)
            if said is not None:
                console.print(f"{said}.", style="bold", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        _finish(rows, machine, folder)
        console.print(f"Interrupted: {len(rows)} rows were measured.", style="bold", highlight=False)
        sys.exit(INTERRUPTED)
    _finish(rows, machine, folder)


def _finish(rows: list[BenchmarkRow], machine: Machine, folder: Path) -> None:
    if not rows:
        return
    draw_speed_up(rows, machine).savefig(folder / "benchmark.png", dpi=150)
    _console().print(f"Picture and all rows: {folder / 'benchmark.png'}, benchmark.csv", soft_wrap=True)
    noisy = sum(row.noisy for row in rows)
    if noisy:
        Console(stderr=True).print(
            f"Too noisy to tell: in {noisy} of {len(rows)} rows half the interquartile range of the dense times is "
            f"above {NOISE_BOUND:.0%} of their median. Stop what else runs here, or take --threads down.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _console() -> Console:
    """Standard output, wide enough for the table where it is no terminal."""
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console
