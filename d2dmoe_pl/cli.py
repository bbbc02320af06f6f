"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` of LightningCLI, and ``chain``."""

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from d2dmoe_pl.chain import chain_parser, default_recipe, run_chain
from d2dmoe_pl.errors import ConfigError, NonFiniteLossError
from d2dmoe_pl.phase_cli import PhaseCLI

CHAIN = "chain"


class D2DMoECLI(PhaseCLI):
    """PhaseCLI with one more subcommand, which opens a PhaseCLI for each of its phases."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: object) -> None:
        super()._add_subcommands(parser, **kwargs)
        chain = chain_parser()
        self._subcommand_parsers[CHAIN] = chain
        parser._subcommands_action.add_subcommand(CHAIN, chain, help=chain.description)

    def _set_seed(self) -> None:
        if self.config.subcommand != CHAIN:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Make phase, data and trainer; a chain makes those of each phase when it comes to it."""
        if self.subcommand != CHAIN:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == CHAIN:
            run_chain(self.config[CHAIN])
        else:
            super()._run_subcommand(subcommand)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can mend ends in one line on standard error.

    Args:
        args: Arguments, those of the process if not given.
    """
    arguments: ArgsType = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == [CHAIN] and not any(
        argument.startswith(("--config", "-c", "-h", "--help")) for argument in arguments
    ):
        arguments[1:1] = ["--config", str(default_recipe())]
    try:
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
