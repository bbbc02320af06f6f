"""``main.py benchmark``: measure, show, and keep what is measured."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console

from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.compared_modules import find_way
from d2dmoe_pl.benchmark.comparison import Comparison, Settings, measure
from d2dmoe_pl.benchmark.machine import Machine, this_machine
from d2dmoe_pl.benchmark.result_rows import BenchmarkRow, as_table, draw_speed_up, write_csv
from d2dmoe_pl.benchmark.shape_comparisons import Shape, shape_comparisons
from d2dmoe_pl.benchmark.timing import NOISE_BOUND
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.execution import BACKENDS
from d2dmoe_pl.moe.gating import check_tau
from d2dmoe_pl.recipe import is_recipe, read_recipe

DEFAULT_BACKEND = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")
SCOPES = ("layer", "model")
TABLE_WIDTH = 110
INTERRUPTED = 130  # what shells give a program that Ctrl-C ended


class CommaSeparated:
    """A parser's type: ``1,2,3`` on the command line, that or a list in YAML."""

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind
        self.__name__ = f"comma-separated {kind.__name__}"

    def __call__(self, given: object) -> list:
        return [self.kind(part) for part in (given if isinstance(given, list) else str(given).split(","))]

    def __repr__(self) -> str:
        return self.__name__


class DataConfigFile(ActionConfigFile):
    """``--config`` of a benchmark: YAML with its settings, or a recipe for its data."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take what the recipe's phases share for data as if it had been written on the command line."""
        if is_recipe(values):
            shared = read_recipe(values).get("shared", {})
            check("data" in shared, f"config={values!r}: is a recipe whose phases share no data")
            values = json.dumps({"data": shared["data"]})
        super().__call__(parser, cfg, values, option_string)


def benchmark_parser() -> ArgumentParser:
    """The arguments of the ``benchmark`` subcommand."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Time a converted model, or a shape, against its dense twin: latency, throughput, memory.",
        allow_abbrev=False,
    )
    numbers, shares, words = CommaSeparated(int), CommaSeparated(float), CommaSeparated(str)
    parser.add_argument(
        "-c", "--config", action=DataConfigFile, help="YAML with the settings below, or a recipe, for its data."
    )
    parser.add_argument("--output_dir", type=str, default="runs/benchmark", help="Gets benchmark.csv, benchmark.png.")
    parser.add_argument("--scope", type=words, default=list(SCOPES), help="layer: FFNs alone; model: whole models.")
    parser.add_argument("--dtype", type=words, default=["float32"], help=f"Some of {', '.join(DTYPES)}.")
    parser.add_argument("--batch_size", type=numbers, default=[1, 8], help="Samples a call of a whole model.")
    parser.add_argument("--backend", type=str, default=DEFAULT_BACKEND, help="Name of a file in moe/execution.")
    parser.add_argument(
        "--compare",
        type=words,
        default=[],
        help="Other ways to run the experts of layers: loop, grouped_mm, or files in moe/execution.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto (a GPU if there is one), cpu or cuda.")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; PyTorch's choice if not given.")
    parser.add_argument("--rounds", type=int, default=11, help="Samples of each time, whose median is shown.")

    artifact = parser.add_argument_group("a converted model")
    artifact.add_argument("--artifact", type=str | None, default=None, help="Folder that RouterRegression wrote.")
    artifact.add_argument("--tau", type=shares, default=[0.5, 0.7, 0.8, 0.9, 1.0], help="In [0, 1]; 1 is dense.")
    artifact.add_argument("--length", type=int, default=128, help="Tokens of each text, if no data is given.")
    parser.add_subclass_arguments(
        TaskData,
        "data",
        required=False,
        help="Whose test samples are run. Noise otherwise, of which routers make what they will.",
    )

    shape = parser.add_argument_group("a shape of random weights and forced random choices, without an artifact")
    shape.add_argument("--d_model", type=int, default=768, help="Width of the tokens.")
    shape.add_argument("--d_ff", type=int, default=3072, help="Neurons of an FFN.")
    shape.add_argument("--num_experts", type=numbers, default=[96], help="Each must divide d_ff.")
    shape.add_argument("--gated", type=bool, default=False, help="Gated FFNs; only with --scope layer.")
    shape.add_argument("--activation", type=str, default="relu", help="relu, gelu, silu or tanh.")
    shape.add_argument("--router_width", type=int, default=128, help="Measured with routers too; 0 for none.")
    shape.add_argument("--tokens", type=numbers, default=[1, 197, 1024, 4096], help="That an FFN alone is given.")
    shape.add_argument("--share", type=shares, default=[0.1, 0.2, 0.4, 1.0], help="Of the experts, those that run.")
    shape.add_argument("--layers", type=int, default=12, help="Depth of the whole model.")
    shape.add_argument(
        "--architecture",
        type=str,
        default="vit_base_patch16_224",
        help="timm model that gives the whole model all but its widths and depth.",
    )
    return parser


def run_benchmark(config: Namespace) -> None:
    """Measure, and show and keep the rows; those measured before Ctrl-C too.

    Args:
        config: What :func:`benchmark_parser` parsed.

    Raises:
        ConfigError: For a wrong setting.
        SystemExit: After Ctrl-C.
    """
    given = benchmark_parser().instantiate(config)
    settings = _settings(given)
    comparisons = _comparisons(given, settings)
    threads = torch.get_num_threads()
    try:
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        _run(comparisons, settings, Path(given.output_dir))
    finally:
        torch.set_num_threads(threads)


def _settings(given: Namespace) -> Settings:
    for scope in given.scope:
        check(scope in SCOPES, f"scope={scope!r}: allowed are {', '.join(SCOPES)}")
    for dtype in given.dtype:
        check(dtype in DTYPES, f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    for batch_size in given.batch_size:
        check(batch_size > 0, f"batch_size={batch_size}: must be positive")
    BACKENDS.find(given.backend, "backend")
    for name in given.compare:
        find_way(name)
    check(given.rounds > 1, f"rounds={given.rounds}: must be at least 2")
    check(given.threads is None or given.threads > 0, f"threads={given.threads}: must be positive")
    check(given.device in DEVICES, f"device={given.device!r}: allowed are {', '.join(DEVICES)}")
    gpu = torch.cuda.is_available()
    check(given.device != "cuda" or gpu, "device='cuda': PyTorch finds no GPU here; allowed are auto, cpu")
    return Settings(
        scope=given.scope,
        dtype=[DTYPES[dtype] for dtype in given.dtype],
        batch_size=given.batch_size,
        backend=given.backend,
        compare=given.compare,
        rounds=given.rounds,
        device=torch.device("cuda" if gpu and given.device != "cpu" else "cpu"),
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
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console
