"""The four routings of MoEBERT on the docstrings recipe, distillation against none, importance against chance.

    python tests/benchmarks/docstrings_moebert.py --output_dir runs/docstrings_comparison

One dense model and its importance scores a seed serve all variants. Run again after an interruption, it goes on.
"""

import argparse
import csv
import shutil
from pathlib import Path
from statistics import mean, stdev

import torch

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, read_artifact
from d2dmoe_pl.cli import main as run
from d2dmoe_pl.data import Docstrings
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.moebert.conversion import convert_to_moebert_
from d2dmoe_pl.moebert.layer import MoEBERTConfig

RECIPE = Path(__file__).parents[2] / "configs" / "docstrings_bert.yaml"
SHARED = ("fine_tuning", "importance_scoring")
DISTILLATION = "moebert_distillation"
VARIANTS = {
    "hash_random": [],
    "hash_balance": ["model.init_args.routing=hash_balance"],
    "gate_token": ["model.init_args.routing=gate_token"],
    "gate_sentence": ["model.init_args.routing=gate_sentence"],
    "hash_random, beta 0": ["model.init_args.beta=0"],
}


def chain(folder: Path, seed: int, settings: list[str]) -> None:
    sets = [argument for setting in settings for argument in ("--set", f"{DISTILLATION}.{setting}")]
    run(["chain", "--config", str(RECIPE), "--output_dir", str(folder), "--seed", str(seed), *sets])


def distilled(folder: Path) -> dict[str, str]:
    """The row of the test split."""
    with (folder / DISTILLATION / "tau_sweep.csv").open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row["stage"] == "test")


def dense_accuracy(folder: Path) -> float:
    history = read_artifact(folder / "importance_scoring" / "artifact").history
    return 100 * next(record.metrics["test/accuracy"] for record in history if "test/accuracy" in record.metrics)


def untrained(folder: Path, data: Docstrings, chance_seed: int | None) -> tuple[float, float]:
    """The experts before any training, of the important neurons or of ones drawn by chance.

    Returns:
        Test accuracy in percent, and the mean symmetric KL divergence from the dense model's predictions.
    """
    artifact = read_artifact(folder / "importance_scoring" / "artifact")
    dense, model = load_model(artifact.path).eval(), load_model(artifact.path).eval()
    scores = artifact.read_tensors("importance")
    if chance_seed is not None:
        generator = torch.Generator().manual_seed(chance_seed)
        scores = {name: torch.rand(len(score), generator=generator) for name, score in scores.items()}
    convert_to_moebert_(model, MoEBERTConfig(4, 128, 85, "hash_random", 0.0, 0), importance=scores)
    right, distances = 0, []
    with torch.no_grad():
        for batch in data.test_dataloader():
            logits, expected = (adapter_for(each).logits(each, batch) for each in (model, dense))
            right += int((logits.argmax(dim=1) == batch["labels"]).sum())
            distances.append(symmetric_kl(logits, expected))
    distance = torch.cat(distances)
    return 100 * right / len(distance), float(distance.mean())


def spread(values: list[float]) -> str:
    return f"{mean(values):7.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/docstrings_comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    data = Docstrings(max_length=32, batch_size=64)
    data.setup()
    rows: dict[str, list[float]] = {}
    for seed in options.seeds:
        base = options.output_dir / f"seed_{seed}"
        for variant, settings in VARIANTS.items():
            folder = base / variant.replace(", ", "_").replace(" ", "_")
            for phase in SHARED:
                done = base / next(iter(VARIANTS)) / phase
                if done.exists() and not (folder / phase).exists():
                    shutil.copytree(done, folder / phase)
            chain(folder, seed, settings)
            rows.setdefault(variant, []).append(float(distilled(folder)["accuracy"]))
        rows.setdefault("dense", []).append(dense_accuracy(folder))
        important = untrained(folder, data, None)
        chance = [mean(values) for values in zip(*(untrained(folder, data, draw) for draw in range(5)), strict=True)]
        for name, values in (("important neurons", important), ("neurons by chance, mean of 5", chance)):
            for measure, value in zip(("accuracy", "KL from dense"), values, strict=True):
                rows.setdefault(f"untrained, {name}: {measure}", []).append(value)
        for name, values in rows.items():
            print(f"{name:56} {spread(values)}", flush=True)


if __name__ == "__main__":
    main()
