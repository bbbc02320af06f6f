"""What the two training steps of our own cost, as ratios measured in one process, alternating, medians.

    python tests/benchmarks/training_steps.py

- ``RouterRegression``'s step against the frozen model's own forward pass: d=768, h=3,072, E=128, 1,024 tokens.
- ``SparsityEnforcement``'s step against a plain fine-tuning step of the same model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.data import Classification
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.phases import FineTuning, RouterRegression, SparsityEnforcement

BATCH, LENGTH, NUM_EXPERTS = 8, 128, 128


def attach(phase, model: nn.Module):
    """Give a phase its model without a Trainer."""
    phase.model = model
    phase.task = Classification(["0", "1"])
    phase.progress = lambda: 0.0  # without one, training has just begun
    phase.log = phase.log_dict = lambda *args, **kwargs: None
    return phase


def compare(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median and spread (half the interquartile range) of each contender's seconds, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def report(title: str, results: dict[str, tuple[float, float]], allowed: float) -> None:
    (base, base_time), (other, other_time) = ((name, result[0]) for name, result in results.items())
    print(title)
    for name, (median, spread) in results.items():
        print(f"  {name:38s} {1000 * median:8.1f} ms +- {1000 * spread:.1f}")
    print(f"  {other} / {base}: {other_time / base_time:.3f} (at most {allowed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=options.layers)
    model = HuggingFaceModel("text-classification", config=config).build(["a", "b"])
    swap_activation_(model, ActivationConfig("relu"))
    batch = {
        "input_ids": torch.randint(5, 30000, (BATCH, LENGTH)),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, 2, (BATCH,)),
    }
    threads, tokens = torch.get_num_threads(), BATCH * LENGTH
    print(f"torch {torch.__version__}, {threads} threads, {options.layers} layers, {tokens} tokens")

    plain = attach(FineTuning(init_from="-"), model)
    sparse = attach(SparsityEnforcement("hoyer", init_from="-"), model)
    sparse._ffns = select_ffns(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(phase) -> None:
        optimizer.zero_grad()
        phase.training_step(batch, 0).backward()
        optimizer.step()

    for penalty in ("l1", "hoyer"):
        sparse.penalty = penalty
        contenders = {"fine-tuning step": lambda: step(plain), f"sparsity step ({penalty})": lambda: step(sparse)}
        report("SparsityEnforcement", compare(contenders, options.rounds), 1.15)

    convert_to_moe_(model, ExpertsConfig(NUM_EXPERTS))
    routers = attach(RouterRegression(128, init_from="-"), model)
    routers.transform_(model)
    routers.on_fit_start()
    router_parameters = [p for layer in moe_layers(model).values() for p in layer.router.parameters()]
    router_optimizer = torch.optim.AdamW(router_parameters, lr=1e-3)

    def forward() -> None:
        with torch.no_grad():
            plain.logits(batch)

    def router_step() -> None:
        router_optimizer.zero_grad()
        routers.training_step(batch, 0).backward()
        router_optimizer.step()

    contenders = {"frozen model's forward": forward, "router step": router_step}
    report("RouterRegression", compare(contenders, options.rounds), 1.5)


if __name__ == "__main__":
    main()
