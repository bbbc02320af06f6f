"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` of LightningCLI, ``chain`` and ``benchmark``."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from d2dmoe_pl.benchmark import benchmark_parser, run_benchmark
from d2dmoe_pl.chain import chain_parser, default_recipe, run_chain
from d2dmoe_pl.failures import failure_of, folder_of, write_traceback
from d2dmoe_pl.phase_cli import EVALUATING, PhaseCLI, without_needless_warnings
from d2dmoe_pl.run_folders import with_run

CHAIN = "chain"
DEBUG = "--debug"
# subcommands that are no phase's run: what parses their arguments, and what runs them
OWN = {CHAIN: (chain_parser, run_chain), "benchmark": (benchmark_parser, run_benchmark)}


class D2DMoECLI(PhaseCLI):
    """PhaseCLI with subcommands of our own beside Lightning's."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: object) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name in ("validate", "test"):
            self._subcommand_parsers[name].set_defaults(verbose=False)
        for name, (make_parser, _) in OWN.items():
            own: Any = make_parser()
            self._subcommand_parsers[name] = own
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, own, help=own.description)

    def after_validate(self) -> None:
        """Print what was measured, a line a metric; Lightning's own table cuts names."""
        _print_metrics(self.trainer)

    def after_test(self) -> None:
        """As after ``validate``."""
        _print_metrics(self.trainer)

    def _set_seed(self) -> None:
        if self.subcommand not in OWN:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Make phase, data and trainer; our own subcommands make what they need when they come to it."""
        if self.subcommand not in OWN:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in OWN:
            _, run = OWN[subcommand]
            run(self.config[subcommand])
        else:
            super()._run_subcommand(subcommand)


def _print_metrics(trainer: Trainer) -> None:
    if trainer.is_global_zero:
        table = Table("metric", "value", box=box.SIMPLE_HEAD, padding=(0, 1))
        for name, value in trainer.callback_metrics.items():
            table.add_row(name, f"{float(value):.4f}")
        Console().print(table)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; whatever ends it is said in one line on standard error.

    Args:
        args: Arguments, those of the process if not given. ``--debug`` among them lets errors come with a traceback.
    """
    arguments: list[str] = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    try:
        with without_needless_warnings():
            D2DMoECLI(args=_prepared(arguments))
    except Exception as error:
        if debug:
            raise
        sys.exit(_say(error))


def _prepared(arguments: list[str]) -> list[str]:
    """Arguments with what goes without saying: the embedded recipe, the model of a finished run."""
    if arguments[:1] and arguments[0] in EVALUATING:
        arguments[1:] = with_run(arguments[1:])
    if arguments[:1] == [CHAIN] and not any(
        argument.startswith(("--config", "-c", "-h", "--help")) for argument in arguments
    ):
        arguments[1:1] = ["--config", str(default_recipe())]
    return arguments


def _say(error: Exception) -> int:
    """Print what ``error`` means; the exit status."""
    failure, folder = failure_of(error), folder_of(error)
    line = failure.line
    if not failure.is_known:
        line += f"; the traceback is in {write_traceback(error, folder)}"
    if folder is not None:
        line += "; the same command goes on from there"
    print(f"error: {line}", file=sys.stderr)
    return failure.code


if __name__ == "__main__":
    main()
