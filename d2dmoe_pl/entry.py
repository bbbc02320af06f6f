"""The command, as it is installed: what can be said at once is said without importing all that a run needs."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pkgutil import resolve_name

from d2dmoe_pl.benchmark_arguments import benchmark_arguments
from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.compile_arguments import compile_parser
from d2dmoe_pl.compress_arguments import compress_parser

PARSERS = {
    "chain": chain_parser,
    "compress": compress_parser,
    "compile": compile_parser,
    "benchmark": benchmark_arguments,
}
USAGE = """\
usage: d2dmoe-pl {command} ... [--debug]

Turn a trained dense Transformer into a Mixture-of-Experts with less compute per token.

commands:
    chain               Run the phases of a recipe, in order; run again after an interruption, it goes on.
    compress            Make a model cost what you say: choose a recipe, run it, report.
    fit                 Run one phase.
    validate            Evaluate on the validation split: of a finished run, by --run FOLDER.
    test                The same on the test split.
    predict             Write what the model says of each sample, and what that cost.
    compile             Compile a model ahead of time, for processors like this one.
    benchmark           Time models and layers on this machine.

options:
    -h, --help          Of a command too: d2dmoe-pl chain --help.
    --version           Show the version.
    --debug             Let an error come with its traceback, rather than as one line.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, see :func:`d2dmoe_pl.cli.main`.

    Args:
        args: Arguments, those of the process if not given.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a bar that a terminal has no letters for is to end no training
        sys.stdout.reconfigure(errors="replace")
    asks_for_help = any(argument in ("-h", "--help") for argument in arguments[1:])
    if arguments in ([], ["-h"], ["--help"]):
        _say(USAGE)
    elif arguments == ["--version"]:
        _say(f"d2dmoe_pl {metadata.version('d2dmoe_pl')}\n")
    elif arguments[0] in PARSERS and asks_for_help:
        parser = PARSERS[arguments[0]]()
        parser.prog = f"d2dmoe-pl {arguments[0]}"
        _say(parser.format_help())
    else:
        try:
            run = resolve_name("d2dmoe_pl.cli:main")
        except KeyboardInterrupt:  # in the seconds that imports take
            sys.exit(130)
        run(arguments)


def _say(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
