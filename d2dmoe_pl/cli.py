"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` of LightningCLI, ``chain`` and ``benchmark``."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from d2dmoe_pl.benchmark import benchmark_parser, run_benchmark
from d2dmoe_pl.chain import chain_parser, default_recipe, run_chain
from d2dmoe_pl.errors import ConfigError, NonFiniteLossError
from d2dmoe_pl.phase_cli import PhaseCLI, without_needless_warnings

CHAIN = "chain"
# subcommands that are no phase's run: what parses their arguments, and what runs them
OWN = {CHAIN: (chain_parser, run_chain), "benchmark": (benchmark_parser, run_benchmark)}


class D2DMoECLI(PhaseCLI):
    """PhaseCLI with subcommands of our own beside Lightning's."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: object) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, (make_parser, _) in OWN.items():
            own: Any = make_parser()
            self._subcommand_parsers[name] = own
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, own, help=own.description)

    def _set_seed(self) -> None:
        if self.config.subcommand not in OWN:
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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can mend ends in one line on standard error.

    Args:
        args: Arguments, those of the process if not given.
    """
    arguments: list[str] = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == [CHAIN] and not any(
        argument.startswith(("--config", "-c", "-h", "--help")) for argument in arguments
    ):
        arguments[1:1] = ["--config", str(default_recipe())]
    try:
        with without_needless_warnings():
            D2DMoECLI(args=arguments)
    except Exception as error:
        mendable = _mendable(error)
        if mendable is None:
            raise
        print(f"error: {mendable}", file=sys.stderr)
        sys.exit(2 if isinstance(mendable, ConfigError) else 1)


def _mendable(error: BaseException | None) -> ConfigError | NonFiniteLossError | None:
    """What a user can mend, at the root of ``error``; the parser wraps what constructors raise in errors of its own."""
    while error is not None and not isinstance(error, (ConfigError, NonFiniteLossError)):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    main()
