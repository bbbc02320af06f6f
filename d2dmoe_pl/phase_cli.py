"""How one phase is put together from the command line: phase, data, trainer, and what every run keeps."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from d2dmoe_pl import adapters, data
from d2dmoe_pl.callbacks import SaveArtifact, StopOnNonFinite
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import Phase
from d2dmoe_pl.phases._ordered_pass import OrderedPass
from d2dmoe_pl.phases._preflight import preflight
from d2dmoe_pl.recipe import is_recipe, phase_config, read_recipe

CHECKPOINT = "last"

# Lightning's own affair, or true and meant so; said at every start or resumption of a phase
SAID_FOR_NOTHING = (
    ".*LeafSpec.* is deprecated",
    "`LightningModule.configure_optimizers` returned `None`",
    "Checkpoint directory .* exists and is not empty",
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
        if is_recipe(recipe):
            values = json.dumps(phase_config(read_recipe(recipe), phase))
        super().__call__(parser, cfg, values, option_string)


class PhaseCLI(LightningCLI):
    """LightningCLI over phases and data modules, by class name."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        for package in (data, adapters):  # classes that have been imported are found by their bare names
            for name in package.__all__:
                getattr(package, name)
        super().__init__(
            Phase,
            TaskData,
            subclass_mode_model=True,
            subclass_mode_data=True,
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
            allow_abbrev=False, dump_header=[f"lightning.pytorch=={L.__version__}"], **kwargs
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
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Let phases that pass over the data once run one epoch, where nothing is said of epochs."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        model = config.get("model")
        if model is not None and issubclass(resolve_name(model.class_path), OrderedPass):
            config.trainer.max_epochs = 1

    def before_fit(self) -> None:
        """Check the phase against its model before any data is loaded or file written."""
        preflight([self.model], [self.datamodule])


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
        filename=CHECKPOINT, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    return [StopOnNonFinite(), SaveArtifact(), checkpoint]
