"""How one phase is put together from the command line: phase, data, trainer, and what every run keeps."""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from d2dmoe_pl import adapters, data
from d2dmoe_pl.callbacks import PurgeRepeatedSteps, SaveArtifact, SaveBeforeRequeue, StopOnNonFinite
from d2dmoe_pl.checkpoints import LAST, WholeCheckpoints, check_checkpoint
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.null_settings import check_nulls
from d2dmoe_pl.phases import Phase
from d2dmoe_pl.phases._callback_checks import check_callbacks
from d2dmoe_pl.phases._ordered_pass import OrderedPass
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.phases._sharding import check_strategy
from d2dmoe_pl.recipe import is_recipe, phase_config, read_recipe
from d2dmoe_pl.run_folders import check_data_is_here, logger_beside, loggers_in
from d2dmoe_pl.signals import leave_signals_to_us
from d2dmoe_pl.whole_files import named_folder

NAMED_PHASE = re.compile(r"[\w./-]+:\w+")
EVALUATING = ("validate", "test", "predict")
NESTED = re.compile(r"--(trainer|model|data)(\.\w+)+")

# Lightning's own affair, or true and meant so; said at every start or resumption of a phase
SAID_FOR_NOTHING = (
    ".*LeafSpec.* is deprecated",
    "`LightningModule.configure_optimizers` returned `None`",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches \\(1\\) is smaller",
    "Found .* module\\(s\\) in eval mode at the start of training",
)


class PhaseConfigFile(ActionConfigFile):
    """``--config`` of a phase: YAML with its settings, or RECIPE:PHASE."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take what the recipe says of the phase as if it had been written on the command line."""
        recipe, _, phase = values.rpartition(":")
        if is_recipe(values):
            phases = ", ".join(read_recipe(values)["phases"])
            raise ConfigError(f"config={values!r}: is a recipe; add :PHASE, one of {phases}")
        # a recipe that is not there is told with those that are
        if is_recipe(recipe) or (NAMED_PHASE.fullmatch(values) and not os.path.exists(values)):
            values = json.dumps(phase_config(read_recipe(recipe), phase))
        super().__call__(parser, cfg, values, option_string)


class SavedConfig(SaveConfigCallback):
    """``config.yaml`` of a run, in which a setting that has a word of a list as its default is that word."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, _in_words(config), **kwargs)


def _in_words(value: Any) -> Any:
    if isinstance(value, Namespace):
        return Namespace(**{key: _in_words(each) for key, each in vars(value).items()})
    if isinstance(value, list):
        return [_in_words(each) for each in value]
    return value.value if isinstance(value, Enum) else value


class PhaseCLI(LightningCLI):
    """LightningCLI over phases and data modules, by class name.

    Args:
        args: Command-line arguments; those of the process if not given.
        run: Whether a subcommand comes first, and is run.
        folder: Of the phase, in that of a chain; what it leaves is written there, whatever loggers are asked for.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, folder: Path | None = None) -> None:
        self.folder = folder
        for package in (data, adapters):  # classes that have been imported are found by their bare names
            for name in package.__all__:
                getattr(package, name)
        super().__init__(
            Phase,
            TaskData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},  # a resumed phase writes to the folder it began
            trainer_defaults={"callbacks": _default_callbacks()},
            seed_everything_default=0,
            parser_kwargs={"description": __doc__} if not run else {},
            args=args,
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Take no abbreviations, so that a misspelt option is an error, and phases of recipes in ``--config``."""
        parser = LightningArgumentParser(
            allow_abbrev=False, exit_on_error=False, dump_header=[f"lightning.pytorch=={L.__version__}"], **kwargs
        )
        parser.add_argument(
            "-c",
            "--config",
            action=PhaseConfigFile,
            help="YAML as --print_config prints it, or a phase of a recipe, RECIPE:PHASE, such as "
            "configs/digits_vit.yaml:fine_tuning. Of several, later ones change what earlier ones say.",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI warns when it gets arguments while the process has others; a chain does so on purpose
        assert args is None or isinstance(args, Sequence)
        self.config = parser.parse_args(with_nulls_as_configs(sys.argv[1:] if args is None else args))
        subcommand = self.config.get("subcommand")
        given = self.config if subcommand is None else self.config[subcommand]
        if given.get("ckpt_path") is not None and given.get("weights_only") is not False:
            check_checkpoint(given.ckpt_path)  # which Lightning would read next

    def before_instantiate_classes(self) -> None:
        """Let phases that pass over the data once run one epoch, where nothing is said of epochs."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        self._check_nulls(config)
        if config.trainer.get("default_root_dir") is not None:
            named_folder(str(config.trainer.default_root_dir), "default_root_dir")
        if self.subcommand in EVALUATING:
            check_data_is_here(config)
            logger_beside(config.trainer.get("logger"))
            self.save_config_callback = None  # the run's own config stays
        if self.folder is not None:
            config.trainer.logger = loggers_in(self.folder, config.trainer.get("logger"))
        model = config.get("model")
        if model is not None and issubclass(resolve_name(model.class_path), OrderedPass):
            config.trainer.max_epochs = 1

    def _check_nulls(self, config: Namespace) -> None:
        phase = "" if self.folder is None else f"{self.folder.name}: "
        check_nulls(f"{phase}trainer", L.Trainer, config.trainer)
        for name in ("model", "data"):
            made = config.get(name)
            if made is not None and made.get("init_args") is not None:
                check_nulls(f"{phase}{name}.init_args", resolve_name(made.class_path), made.init_args)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Let what Lightning refuses be a setting of the user's, as it is."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if self.subcommand in (None, "fit"):
            check_training(config.trainer)
        else:
            check_evaluation(config.trainer, self.subcommand)
        check_devices(config.trainer)
        self._settle_callbacks(config.trainer)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        check_strategy(self.model, trainer.strategy)
        writes = self.subcommand not in EVALUATING and not trainer.fast_dev_run  # type: ignore[attr-defined] # Lightning sets it
        first = next(iter(trainer.loggers), None)
        check(
            not writes or first is None or first.save_dir is not None,
            f"logger={type(first).__name__}: has no save_dir, where a phase would leave what it makes; must come "
            "behind one that has, such as TensorBoardLogger",
        )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user has asked for no other
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        leave_signals_to_us(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it
            if writes and isinstance(callback, PurgeRepeatedSteps):
                callback.read(trainer.loggers)
        return trainer

    def _settle_callbacks(self, trainer: Mapping[str, Any]) -> None:
        """Check the callbacks, and leave out the checkpoints of a trainer that is to write none."""
        own = self.trainer_defaults["callbacks"]
        if trainer.get("enable_checkpointing") is False or trainer.get("barebones"):
            own = self.trainer_defaults["callbacks"] = [each for each in own if not isinstance(each, ModelCheckpoint)]
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        check_callbacks([*(given if isinstance(given, list) else [given]), *own], self.model)

    def _set_seed(self) -> None:
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        seed = config.get("seed_everything")
        check(seed is None or 0 <= int(seed) < 2**32, f"seed_everything={seed}: must lie in [0, 2**32)")
        super()._set_seed()

    def before_fit(self) -> None:
        """Check the phase against its model before any data is loaded or file written."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it
        preflight([self.model], [self.datamodule], self.trainer.strategy, [callbacks])


def check_training(trainer: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for settings of a trainer by which nothing would be trained."""
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        check(trainer.get(key) != 0, f"{key}={trainer.get(key)}: nothing would be trained; must not be 0")
    accumulated = trainer.get("accumulate_grad_batches", 1)
    check(accumulated > 0, f"accumulate_grad_batches={accumulated}: must be positive")


def check_evaluation(trainer: Mapping[str, Any], subcommand: str) -> None:
    """Raise ``ConfigError`` for settings of a trainer by which an evaluation would do nothing."""
    key = f"limit_{'val' if subcommand == 'validate' else subcommand}_batches"
    check(trainer.get(key) != 0, f"{key}={trainer.get(key)}: {subcommand} would do nothing; must not be 0")


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for more processes than a machine without accelerator has processors."""
    devices, accelerator = str(trainer.get("devices")), trainer.get("accelerator")
    processors = max(2, os.cpu_count() or 1)
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    check(
        not (on_cpu and devices.isdecimal() and int(devices) > processors),
        f"devices={devices}: each is a process here; must be at most {processors}, the processors of this machine",
    )


def with_nulls_as_configs(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which settings that hold a null are configs of their own.

    The parser writes the value of a nested setting out and reads it again, which makes ``None`` of a null.

    Example:
        >>> from d2dmoe_pl.phase_cli import with_nulls_as_configs
        >>> with_nulls_as_configs(["fit", "--data.init_args.source.test=null", "--data.init_args.batch_size=8"])
        ['fit', '--config={"data": {"init_args": {"source": {"test": null}}}}', '--data.init_args.batch_size=8']
    """
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if NESTED.fullmatch(key):
            if not equals and rest and "null" in rest[0]:
                value = rest[0]
            overlay = _overlay(key.removeprefix("--").split("."), value) if "null" in value else None
            if overlay is not None:
                rest = rest if equals else rest[1:]
                argument = f"--config={json.dumps(overlay)}"
        found.append(argument)
    return found


def _overlay(keys: list[str], text: str) -> dict[str, Any] | None:
    """A config that says of one setting what is written for it; None if that holds no null."""
    try:
        value = get_loader("yaml")(text)
    except yaml.YAMLError:
        return None
    if not _holds_null(value):
        return None
    if keys[0] in ("model", "data") and keys[1] not in ("class_path", "init_args", "dict_kwargs"):
        keys = [keys[0], "init_args", *keys[1:]]
    for key in reversed(keys):
        value = {key: value}
    return value


def _holds_null(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(_holds_null(part) for part in parts)


@contextmanager
def without_needless_warnings() -> Iterator[None]:
    """Leave out, while the body runs, what Lightning warns of at every start of a phase."""
    with warnings.catch_warnings():
        for message in SAID_FOR_NOTHING:
            warnings.filterwarnings("ignore", message=message)
        yield


def _default_callbacks() -> list[L.Callback]:
    # every epoch, whether it validates or not
    checkpoint = ModelCheckpoint(
        filename=Path(LAST).stem, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    return [StopOnNonFinite(), SaveArtifact(), SaveBeforeRequeue(), PurgeRepeatedSteps(), checkpoint]
