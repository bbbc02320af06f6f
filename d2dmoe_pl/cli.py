"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` of LightningCLI, ``chain``,
``compress``, ``compile`` and ``benchmark``.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from d2dmoe_pl.benchmark import benchmark_parser, run_benchmark
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.chain import default_recipe, run_chain
from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.compile_arguments import compile_parser
from d2dmoe_pl.compile_command import run_compile
from d2dmoe_pl.compress_arguments import compress_parser
from d2dmoe_pl.compression.command import run_compress
from d2dmoe_pl.data.file_rows import lines_in, lines_of
from d2dmoe_pl.data.local_folders import MEDIA
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import check
from d2dmoe_pl.failures import failure_of, folder_of, write_traceback
from d2dmoe_pl.parser_line import meant
from d2dmoe_pl.phase_cli import EVALUATING, PhaseCLI, without_needless_warnings
from d2dmoe_pl.run_folders import with_run
from d2dmoe_pl.signals import ending_in_order

CHAIN = "chain"
DEBUG = "--debug"
# subcommands that are no phase's run: what parses their arguments, and what runs them
OWN = {
    CHAIN: (chain_parser, run_chain),
    "compress": (compress_parser, run_compress),
    "compile": (compile_parser, run_compile),
    "benchmark": (benchmark_parser, run_benchmark),
}
# Lightning has the first lines of its own docstrings there, which end in the middle of a sentence
EVALUATIONS = {
    "validate": "Evaluate a model on the validation split.",
    "test": "Evaluate a model on the test split.",
    "predict": "Write what the model says of each sample, and what that cost.",
}
# what predict is given in the place of the test split, and what that is
INPUTS = {"text": "texts", "text_file": "texts", "images": "pictures", "recordings": "recordings"}
RUN_SAID = "--run FOLDER, of a finished phase or a chain, stands for its settings and the model that it left."


class D2DMoECLI(PhaseCLI):
    """PhaseCLI with subcommands of our own beside Lightning's."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: object) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name in ("fit", *EVALUATING):  # a checkpoint is read as data; what could run in it is asked for by name
            self._subcommand_parsers[name].set_defaults(weights_only=True)
        for name in ("validate", "test"):
            self._subcommand_parsers[name].set_defaults(verbose=False)
        for name, what in EVALUATIONS.items():
            self._subcommand_parsers[name].description = f"{what} {RUN_SAID}"
        predict = self._subcommand_parsers["predict"]
        predict.set_defaults(return_predictions=False)
        predict.add_argument("--output", type=str, default="predictions.csv", help="Gets a row a sample; or .parquet.")
        predict.add_argument(
            "--text", type=str, nargs="+", action="extend", default=None, help="Texts in the place of the test split."
        )
        predict.add_argument("--text_file", type=str, default=None, help="The same, a line each; - is standard input.")
        predict.add_argument("--images", type=str, default=None, help="A picture, or a folder of them, in its place.")
        predict.add_argument("--recordings", type=str, default=None, help="The same of recordings.")
        for name, (make_parser, _) in OWN.items():
            own: Any = make_parser()
            self._subcommand_parsers[name] = own
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, own, help=own.description)

    def before_instantiate_classes(self) -> None:
        """As for a phase; our own subcommands have none."""
        if self.subcommand not in OWN:
            super().before_instantiate_classes()

    def before_predict(self) -> None:
        """Write predictions; for what is given on the command line, if anything is."""
        config = self.config[self.subcommand]
        given = {name: config[name] for name in INPUTS}
        inputs = given_inputs(**given)
        if inputs is not None:
            _check_kind(given, self.datamodule)
            self.datamodule.predict_for(inputs)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it
        callbacks.append(PredictionFile(config.output, inputs))

    def after_predict(self) -> None:
        """Say where the predictions are."""
        print(f"Predictions: {self.config[self.subcommand].output}")

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


def given_inputs(
    text: Sequence[str] | None = None,
    text_file: str | None = None,
    images: str | None = None,
    recordings: str | None = None,
) -> list[str] | None:
    """What to predict for: texts, the lines of a file or of standard input, or the files below a folder.

    Args:
        text: Texts.
        text_file: A file of texts, ``-`` for standard input.
        images: A picture, or a folder of them.
        recordings: A recording, or a folder of them.

    Returns:
        Texts or paths; None if nothing is given.

    Raises:
        ConfigError: For more than one of the four, or if there is nothing there.
    """
    given_as = {"text": text, "text_file": text_file, "images": images, "recordings": recordings}
    given = [f"{name}={value!r}" for name, value in given_as.items() if value is not None]
    check(len(given) <= 1, f"{', '.join(given_as)}: at most one of these can be given")
    if not given:
        return None
    if text is not None:
        found = list(text)
    elif text_file is not None:
        check(text_file == "-" or Path(text_file).is_file(), f"text_file={text_file!r}: no such file")
        lines = lines_in(sys.stdin.buffer.read(), "text_file='-'") if text_file == "-" else lines_of(text_file)
        found = [line.rstrip("\r\n") for line in lines]  # an empty one too, so that rows are lines
    elif images is not None:
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        found = files_in(Path(images), endings)
    else:
        found = files_in(Path(str(recordings)), MEDIA["audiofolder"][2])
    check(bool(found), f"{given[0]}: there is nothing to predict for")
    return found


def files_in(place: Path, endings: Collection[str]) -> list[str]:
    """The file at ``place``, or those below it, in order, that end so.

    What is hidden, such as what macOS leaves beside files, is none.
    """
    below = [place] if place.is_file() else place.rglob("*")
    found = [file for file in below if file.suffix.lower() in endings and file.is_file()]
    return sorted(str(file) for file in found if not any(part[0] == "." for part in file.relative_to(place).parts))


def _check_kind(given: Mapping[str, Any], data: TaskData) -> None:
    """Raise ``ConfigError`` if data takes other inputs than what is given, such as texts for paths of pictures."""
    for name, value in given.items():
        check(
            value is None or data.raw_inputs in (None, INPUTS[name]),
            f"{name}={value!r}: {type(data).__name__} predicts for {data.raw_inputs}; must be "
            f"{' or '.join(each for each in given if INPUTS[each] == data.raw_inputs)}",
        )


def _print_metrics(trainer: Trainer) -> None:
    if trainer.is_global_zero:
        table = Table("metric", "value", box=box.SIMPLE_HEAD, padding=(0, 1))
        for name, value in trainer.callback_metrics.items():
            table.add_row(name, f"{float(value):.4f}")
        Console(markup=False).print(table)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; whatever ends it is said in one line on standard error.

    Args:
        args: Arguments, those of the process if not given. ``--debug`` among them lets errors come with a traceback.
    """
    arguments: list[str] = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    try:
        with ending_in_order(), without_needless_warnings():
            D2DMoECLI(args=_prepared(arguments))
    except Exception as error:
        if debug:
            raise
        sys.exit(_say(error))


def _prepared(arguments: list[str]) -> list[str]:
    """Arguments with what goes without saying: the embedded recipe, the model of a finished run."""
    if arguments[:1] and arguments[0] in EVALUATING:
        arguments[1:] = with_run(arguments[1:])
    if arguments[:1] and arguments[0] in OWN:
        _check_own(arguments[0], arguments[1:])
    if arguments[:1] == [CHAIN] and not any(
        argument.startswith(("--config", "-c", "-h", "--help")) for argument in arguments
    ):
        arguments[1:1] = ["--config", str(default_recipe())]
    return arguments


def _check_own(subcommand: str, arguments: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a setting that is none of a subcommand's, for a list given in parts, or a part of a
    mapping: the parser would drop the rest.
    """
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    parser: Any = OWN[subcommand][0]()
    known = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    repeated = {option for option in options if options.count(option) > 1}
    defaults = vars(parser.get_defaults()) if repeated else {}
    for option in sorted(repeated):
        name = option.removeprefix("--")
        check(
            not isinstance(defaults.get(name), list) and name != "text_columns",
            f"{option}: is given {options.count(option)} times; must be given once, with all of its values",
        )
    for option in options:
        name = option.removeprefix("--")
        part = name.partition(".")[0]
        check(
            not option.startswith(("--shared.", "--phases.")),
            f"{option}: would be all that is left of {part}; must be --set {option.partition('.')[2]}=VALUE",
        )
        check(
            part in known or name in known,
            f"{option}: no such setting of {subcommand}{_instead(subcommand, name, known)}",
        )


def _instead(subcommand: str, name: str, known: Collection[str]) -> str:
    if subcommand == CHAIN and "." in name:
        return f"; must be --set {name}=VALUE"
    if subcommand == CHAIN and name == "seed_everything":
        return "; must be --seed"
    return meant(name, known) or f"; {subcommand} --help lists them"


def _say(error: Exception) -> int:
    """Print what ``error`` means; the exit status."""
    failure, folder = failure_of(error), folder_of(error)
    line = failure.line
    if not failure.is_known:
        line += f"; the traceback is in {write_traceback(error, folder)}"
    if folder is not None and failure.code == 1:  # with a setting that is wrong it would only fail again
        line += "; the same command goes on from there"
    print(f"error: {line}", file=sys.stderr)
    return failure.code


if __name__ == "__main__":
    main()
