"""What each phase of a chain is told: by the recipe, by ``--set``, and by the chain itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jsonargparse import Namespace

from d2dmoe_pl.callbacks.save_artifact import FOLDER
from d2dmoe_pl.errors import check
from d2dmoe_pl.recipe import PARTS, merged, phase_config

START = "model.init_args.init_from"
OF_THE_CHAIN = ("seed", "output_dir")  # keys of a recipe that are arguments of its own


def split_settings(settings: Sequence[str], names: Sequence[str]) -> dict[str | None, list[str]]:
    """``--set`` as command-line arguments: those of all phases under None, those of one under its name."""
    arguments: dict[str | None, list[str]] = {None: [], **{name: [] for name in names}}
    for setting in settings:
        key, equals, value = setting.partition("=")
        first, _, rest = key.partition(".")
        check(key not in OF_THE_CHAIN, f"set={setting!r}: is no setting of phases; must be given as --{key}")
        check(equals == "=" and rest != "", f"set={setting!r}: must look like trainer.max_epochs=1")
        owner = first if first in names else None
        check(
            owner is not None or first in PARTS,
            f"set={setting!r}: must begin with trainer, data or model, or with a phase: {', '.join(names)}",
        )
        check(
            not key.endswith("trainer.default_root_dir"),
            f"set={setting!r}: a chain gives each phase the folder of its name; must be --output_dir",
        )
        arguments[owner].append(f"--{key if owner is None else rest}={value}")
    return arguments


def check_left_to_chain(config: Namespace, settings: Mapping[str | None, list[str]]) -> None:
    """Raise ``ConfigError`` for what a recipe, or ``--set``, says of a phase that is for the chain to say."""
    given = config.as_dict()
    names = list(given["phases"])
    for name in names:
        phase = merged(given["shared"], given["phases"][name])
        start = phase.get("model", {}).get("init_args", {}).get("init_from")
        folder, seed = phase.get("trainer", {}).get("default_root_dir"), phase.get("seed_everything")
        told = [each for each in (*settings[None], *settings[name]) if each.startswith(f"--{START}=")]
        start = told[-1].partition("=")[2] if told else start
        check(seed is None, f"{name}.seed_everything={seed}: is the same for all phases of a chain; must be seed")
        check(
            folder is None,
            f"{name}.trainer.default_root_dir={folder!r}: a chain gives each phase the folder of its name; must be "
            "output_dir",
        )
        check(
            start is None or name == names[0],
            f"{name}.{START}={start!r}: each phase of a chain but the first begins with what the one before it left; "
            "must be left out",
        )


def phase_arguments(config: Namespace, settings: Mapping[str | None, list[str]], index: int) -> list[str]:
    """The arguments of one phase, as ``fit`` takes them."""
    names = list(config.phases)
    settings_of_phase = phase_config(config.as_dict(), names[index])
    previous = Path(config.output_dir) / names[index - 1] / FOLDER
    return [
        *["--config", json.dumps(settings_of_phase)],
        f"--seed_everything={config.seed}",
        f"--trainer.default_root_dir={Path(config.output_dir) / names[index]}",
        *settings[None],
        *settings[names[index]],
        *([f"--{START}={previous}"] if index > 0 else []),
    ]
