"""D2DMoE and MoEfication on digits at the same cost: ways to split, and ways to choose, over seeds.

    python tests/benchmarks/selection_on_digits.py --output runs/selection_on_digits

Every model is trained for as many epochs: dense for 40 and then 40 more, for D2DMoE with its sparsity penalty, for
MoEfication without; routers for 40. Settings are those of the two recipes on digits. Accuracy is on the test split, at
a budget of FFN FLOPs with the router in, by linear interpolation along each curve; the oracle alone is not charged for
choosing. It can be stopped: what is trained already is not trained again.
"""

import argparse
import csv
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from d2dmoe_pl.cli import main as run

CONFIGS = Path(__file__).parents[2] / "configs"
D2DMOE, MOEFICATION = "digits_vit", "digits_moefication"
BUDGETS = [8.0, 12.5, 15.0, 20.0, 25.0, 35.0, 50.0]  # percent of the dense FFNs' FLOPs
KS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16]
TAUS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97]


@dataclass(frozen=True)
class Variant:
    """One row of the table: which dense model, how its neurons are split, and what chooses experts."""

    method: str
    split: str
    router: str

    @property
    def is_sparse(self) -> bool:
        """Whether the dense model went through sparsity enforcement."""
        return self.method == "D2DMoE"


VARIANTS = [
    Variant("D2DMoE", "activation", "regression"),
    Variant("D2DMoE", "activation", "ground_truth"),
    Variant("D2DMoE", "activation", "random"),
    *(Variant("MoEfication", "coactivation", router) for router in ("mlp", "similarity", "random", "ground_truth")),
    *(Variant("MoEfication", split, "mlp") for split in ("activation", "parameter", "random")),
    *(Variant("MoEfication", split, "ground_truth") for split in ("activation", "parameter", "random")),
]


class Runs:
    """Phases of one seed, each in a folder of its own.

    Args:
        folder: Of the seed.
        seed: Of every phase.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed

    def curve(self, variant: Variant) -> list[tuple[float, float]]:
        """Points (percent of FFN FLOPs, accuracy in percent) of a variant on the test split."""
        dense = self.fit("fine_tuning", D2DMOE, "fine_tuning")
        alpha = [] if variant.is_sparse else ["--model.init_args.alpha=0"]
        kind = "sparse" if variant.is_sparse else "dense"
        dense = self.fit(kind, D2DMOE, "sparsity_enforcement", dense, *alpha)
        split = [f"--model.init_args.split={variant.split}", f"--model.init_args.seed={self.seed}"]
        name = f"{kind}-{variant.split}"
        experts = self.fit(name, MOEFICATION, "expert_clustering", dense, *split)
        name = f"{name}-{variant.router}"
        if variant.router == "regression":
            recipe, phase, settings, swept = D2DMOE, "router_regression", [], {"taus": TAUS}
        else:
            recipe, phase, settings = MOEFICATION, "expert_selection", [f"--model.init_args.router={variant.router}"]
            swept = {"rule": "topk", "ks": KS}
        self.fit(name, recipe, phase, experts, *settings)
        cost = "experts_percent" if variant.router == "ground_truth" else "ffn_flops_percent"
        return self.sweep(name, recipe, phase, cost, swept, *settings)

    def sweep(
        self, name: str, recipe: str, phase: str, cost: str, swept: dict[str, Any], *more: str
    ) -> list[tuple[float, float]]:
        """Points (the column ``cost``, accuracy in percent) on the test split, of what is trained already."""
        file = self.folder / name / "test" / "tau_sweep.csv"
        if not file.is_file():
            callback = f"--trainer.callbacks={json.dumps([{'class_path': 'TauSweep', 'init_args': swept}])}"
            self._run("test", f"{name}/test", recipe, phase, self.folder / name / "artifact", *more, callback)
        with file.open() as opened:
            return sorted((float(row[cost]), float(row["accuracy"])) for row in csv.DictReader(opened))

    def fit(self, name: str, recipe: str, phase: str, start: Path | None = None, *more: str) -> Path:
        """The artifact of a phase, trained if it is not yet."""
        artifact = self.folder / name / "artifact"
        if not artifact.is_dir():
            # nothing is chosen on the validation split
            self._run("fit", name, recipe, phase, start, *more, "--trainer.limit_val_batches=0")
        return artifact

    def _run(self, subcommand: str, name: str, recipe: str, phase: str, start: Path | None, *more: str) -> None:
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": str(self.folder), "name": name, "version": ""},
        }
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        begin = [] if start is None else [f"--model.init_args.init_from={start}"]
        seed = f"--seed_everything={self.seed}"
        config = f"--config={CONFIGS / recipe}.yaml:{phase}"
        run([subcommand, config, seed, f"--trainer.logger={json.dumps(logger)}", *quiet, *begin, *more])


def at_budget(curve: list[tuple[float, float]], budget: float) -> float | None:
    """Accuracy at a cost, between the two nearest points; None outside the curve."""
    costs, accuracies = zip(*curve, strict=True)
    return float(np.interp(budget, costs, accuracies)) if costs[0] <= budget <= costs[-1] else None


def shown(values: list[float | None]) -> str:
    """Mean and standard deviation over seeds; a dash where a seed has no value."""
    if None in values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/selection_on_digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    table = Table("method", "split", "router", *(f"{budget:g}%" for budget in BUDGETS))
    table.title = f"Accuracy on the test digits by FFN FLOPs, router in; seeds {arguments.seeds}, mean ± deviation"
    curves = {
        variant: [Runs(arguments.output / f"seed_{seed}", seed).curve(variant) for seed in arguments.seeds]
        for variant in VARIANTS
    }
    for variant, of_seeds in curves.items():
        cells = [shown([at_budget(curve, budget) for curve in of_seeds]) for budget in BUDGETS]
        table.add_row(variant.method, variant.split, variant.router, *cells)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
