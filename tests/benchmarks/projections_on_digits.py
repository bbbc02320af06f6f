"""D2DMoE on digits with FFNs alone and with attention projections too, at the same cost of the whole model, over seeds.

    python tests/benchmarks/projections_on_digits.py --output runs/projections_on_digits

Both start from one dense model a seed. With projections, 20 epochs of distillation come in between, in which nothing
but their MLPs is trained; sparsity enforcement and routers train for 40 epochs each in both. Settings are those of the
two recipes on digits; FFNs alone are tried with the narrower routers of the other recipe as well. Accuracy is on the
test split, by linear interpolation along each curve. It can be stopped: what is trained already is not trained again.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from selection_on_digits import D2DMOE, TAUS, Runs, at_budget, shown

PROJECTIONS = "digits_vit_projections"
BUDGETS = [27.5, 30.0, 32.5, 35.0, 37.5, 40.0, 42.5, 45.0, 50.0, 60.0]  # percent of the dense model's FLOPs


def ffns_alone(runs: Runs, width: int) -> list[tuple[float, float]]:
    """Points (percent of the model's FLOPs, accuracy in percent) with routers of ``width``."""
    dense = runs.fit("fine_tuning", D2DMOE, "fine_tuning")
    sparse = runs.fit("sparse", D2DMOE, "sparsity_enforcement", dense)
    experts = runs.fit("experts", D2DMOE, "expert_clustering", sparse)
    return curve(runs, f"routed-{width}", D2DMOE, experts, f"--model.init_args.width={width}")


def projections_too(runs: Runs) -> list[tuple[float, float]]:
    """The same with attention projections converted."""
    start = runs.fit("fine_tuning", D2DMOE, "fine_tuning")
    for phase in ("attention_distillation", "sparsity_enforcement", "expert_clustering"):
        start = runs.fit(f"projections-{phase}", PROJECTIONS, phase, start)
    return curve(runs, "projections-routed", PROJECTIONS, start)


def curve(runs: Runs, name: str, recipe: str, experts: Path, *more: str) -> list[tuple[float, float]]:
    """Train routers, and sweep."""
    runs.fit(name, recipe, "router_regression", experts, *more)
    return runs.sweep(name, recipe, "router_regression", "model_flops_percent", {"taus": TAUS}, *more)


def main() -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/projections_on_digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = [Runs(arguments.output / f"seed_{seed}", seed) for seed in arguments.seeds]
    curves = {
        ("FFNs", 16): [ffns_alone(each, 16) for each in runs],
        ("FFNs", 8): [ffns_alone(each, 8) for each in runs],
        ("all", 8): [projections_too(each) for each in runs],
    }
    table = Table("experts", "router width", *(f"{budget:g}%" for budget in BUDGETS))
    table.title = "Accuracy on the test digits by the whole model's FLOPs, routers in; "
    table.title += f"seeds {arguments.seeds}, mean ± deviation"
    for (converted, width), of_seeds in curves.items():
        cells = [shown([at_budget(points, budget) for points in of_seeds]) for budget in BUDGETS]
        table.add_row(converted, str(width), *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
