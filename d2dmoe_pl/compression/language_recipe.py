"""The recipe for a language model: its samples are blocks of many tokens, and seldom are its neurons at rest."""

import math
from collections.abc import Mapping
from typing import Any

from d2dmoe_pl.compression.chosen_recipe import Sizes, adamw, learning_rate, phase

ROUTER_BLOCKS = 384  # that routers learn from, one a step
LOOKED_AT = 16  # blocks that a calibration goes by
EVALUATED = 16  # of a split
TUNED_TOKENS = 1_000_000  # that a model learns from in an epoch, at most
BUDGETS = [0.1, 0.25, 0.375, 0.5, 0.75, 1.0]


def language_phases(
    sizes: Sizes,
    start: Mapping[str, Any],
    effort: str,
    has_cutoffs: bool,
    length: int,
    num_blocks: int,
    batch_size: int,
) -> dict[str, Any]:
    """The phases of a recipe, as those of ``configs/smollm2_wikitext.yaml`` and ``smollm2_wikitext_trained.yaml``.

    Args:
        sizes: Of the model.
        start: ``source`` or ``init_from`` of the first phase.
        effort: ``minutes`` trains nothing but routers; ``hours`` has all weights learn at budgets around a half.
        has_cutoffs: Whether experts leave out small values, which saves time where text is written, else FLOPs alone.
        length: Tokens of a block.
        num_blocks: Of the training split.
        batch_size: Blocks of a batch.
    """
    phases: dict[str, Any] = {}
    if effort == "hours":
        phases["fine_tuning"] = phase("FineTuning", _tuned(sizes, 0.1), _epochs(1, length, num_blocks, batch_size))
    phases["expert_clustering"] = phase(
        "ExpertClustering", {"num_experts": sizes.num_experts, "split": "activation", "num_samples": 64}
    )
    routers = {"width": sizes.router_width, "target": "relative_norm", "rule": "dynk_cumulative", "tau": 0.8}
    passes = max(1, round(ROUTER_BLOCKS / num_blocks))
    few = {"limit_train_batches": ROUTER_BLOCKS} if num_blocks > ROUTER_BLOCKS else {}
    phases["router_regression"] = {
        "data": {"init_args": {"batch_size": 1}},
        **phase(
            "RouterRegression",
            {
                **routers,
                "optimizer": adamw(3e-3, 0.0),
                "decay": "cosine",
                **({"cache_memory": 0} if passes == 1 else {}),
            },
            {"max_epochs": passes, "check_val_every_n_epoch": passes, **few, **language_trainer(1)},
        ),
    }
    if has_cutoffs:
        phases["cutoff_fitting"] = phase("CutoffFitting", {})
    phases["stand_in_fitting"] = phase(
        "StandInFitting", {"rank": sizes.rank, "num_tokens": 6144, "taus": [0.3, 0.45, 0.6, 0.8]}
    )
    looked_at = {"num_samples": LOOKED_AT, "num_scored_samples": LOOKED_AT, "num_scored_points": 10}
    calibration = {"estimate": "gradients", "keep": 0.9, **looked_at}  # by runs, it would take one for each layer
    if effort == "hours":
        phases["first_calibration"] = phase("BudgetCalibration", {"ffn_flops": 0.5, **calibration})
        budgets = {"trains": "model", "task_weight": 0.5, "ffn_flops_min": 0.45, "ffn_flops_max": 0.55}
        phases["model_distillation"] = phase(
            "BudgetDistillation",
            {**budgets, "router_lr": learning_rate(sizes.parameters) / 2, **_tuned(sizes, 0.01)},
            _epochs(2, length, num_blocks, batch_size),
        )
        del calibration["estimate"]  # it knows the way at whose settings it was trained
    sweep = {"class_path": "TauSweep", "init_args": {"budgets": [*BUDGETS]}}
    phases["budget_calibration"] = phase("BudgetCalibration", calibration, {"callbacks": [sweep]})
    next(iter(phases.values()))["model"]["init_args"] |= start
    return phases


def language_trainer(batch_size: int) -> dict[str, Any]:
    """What all phases say of validation and tests: so many blocks as a few minutes are enough for."""
    return {f"limit_{split}_batches": math.ceil(EVALUATED / batch_size) for split in ("val", "test")}


def _tuned(sizes: Sizes, weight_decay: float) -> dict[str, Any]:
    return {"optimizer": adamw(learning_rate(sizes.parameters), weight_decay), "decay": "cosine"}


def _epochs(number: int, length: int, num_blocks: int, batch_size: int) -> dict[str, Any]:
    most = math.ceil(TUNED_TOKENS / (length * batch_size))
    return {"max_epochs": number, **({"limit_train_batches": most} if most * batch_size < num_blocks else {})}
