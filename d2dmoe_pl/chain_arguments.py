"""The arguments of ``chain``; what runs one is imported when it runs."""

import json
from argparse import SUPPRESS
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from d2dmoe_pl.errors import check
from d2dmoe_pl.recipe import read_recipe


class RecipeFile(ActionConfigFile):
    """``--config`` of a chain: a recipe."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the recipe with all that it takes from others as if it had been written first on the command line."""
        check(not cfg.get("config"), f"config={values!r}: is a second recipe; must be one, which extends the other")
        recipe, told = read_recipe(values), cfg.get("set") or []
        super().__call__(parser, cfg, json.dumps(recipe), option_string)
        if told:
            cfg["set"] = [*recipe.get("set", []), *told]


def chain_parser() -> ArgumentParser:
    """The arguments of the ``chain`` subcommand."""
    parser = ArgumentParser(
        description="Run phases in order; run again after an interruption, it goes on.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "-c",
        "--config",
        action=RecipeFile,
        help="A recipe: YAML with shared and phases, or the name of one in configs.",
    )
    parser.add_argument("--shared", type=dict, default={}, help="What every phase takes of fit, e.g. the data.")
    parser.add_argument(
        "--phases", type=dict[str, dict], default={}, help="From the name of each, first to last, to the rest it takes."
    )
    parser.add_argument("--output_dir", type=str, default="runs/chain", help="Gets one folder a phase.")
    parser.add_argument("--seed", type=int, default=0, help="Of every phase.")
    parser.add_argument("--from", type=str, default=SUPPRESS, help="Redo from this phase on.")
    parser.add_argument(
        "--set",
        type=str,
        default=SUPPRESS,
        nargs="*",
        action="extend",
        help="KEY=VALUE as in fit, for all phases (trainer.devices=2) or for one (PHASE.trainer.max_epochs=1).",
    )
    return parser
