"""The recipe for a model and its data: settings chosen from the sizes of both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from d2dmoe_pl.adapters import FFN, adapter_for
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import flops_outside_ffns
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.moe.find_layers import expert_layers, select_ffns

BUDGETS = [0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.35, 0.5, 0.6, 0.75]
EXPERT_DIM = 24  # neurons of an expert, about
EXPERTS = (8, 128)  # of a layer
NARROW_EXPERT_DIM = 4  # where nothing is at rest, and few neurons fire together
NARROW_EXPERTS = (8, 512)
SHORTEST = 8  # tokens of a text, of which attention is next to nothing


@dataclass(frozen=True)
class Sizes:
    """What settings are chosen from, but for the data.

    Attributes:
        d_model: Of the widest FFN.
        d_ff: The same.
        is_sparse: Whether all FFNs have ReLU.
        takes_relu: Whether they can have it.
        parameters: Of the whole model.
        num_experts: ``E``, chosen.
        router_width: Chosen.
        rank: Of stand-ins, chosen.
        num_layers: FFNs that are converted.
        least_ffn_flops: Share of the FFNs' FLOPs that is left with one expert of each layer on.
        least_flops: The same for the whole model, of very short samples.
        tells_hidden_states: Whether its layers are known.
    """

    d_model: int
    d_ff: int
    is_sparse: bool
    takes_relu: bool
    parameters: int
    num_experts: int
    router_width: int
    rank: int
    num_layers: int
    least_ffn_flops: float
    least_flops: float
    tells_hidden_states: bool


def sizes_of(structure: nn.Module, is_narrow: bool = False) -> Sizes:
    """Sizes of a dense model on the meta device, which is converted on the way.

    Args:
        structure: The model.
        is_narrow: Whether experts are to be of a few neurons, and what is beside them twice as large.
    """
    ffns = select_ffns(structure)
    widest = max(ffns, key=lambda ffn: ffn.d_ff)
    num_experts = _num_experts([ffn.d_ff for ffn in ffns], is_narrow)
    width = max(8, round(widest.d_model / (9 if is_narrow else 12) / 8) * 8)
    rank = max(4, round(widest.d_ff / (48 if is_narrow else 96)))  # 1% of an FFN
    is_sparse = all(ffn.is_sparse for ffn in ffns)
    dense = sum(map(_neurons_cost, ffns))
    beside = sum(width * (ffn.d_model + num_experts) + rank * 2 * ffn.d_model + ffn.d_model for ffn in ffns)
    least = 1 / num_experts + beside / dense
    parameters = sum(parameter.numel() for parameter in structure.parameters())
    inputs = {
        key: value.to("meta") for key, value in adapter_for(structure).random_inputs(structure, 1, SHORTEST).items()
    }
    takes_relu = _takes_relu(structure)
    convert_to_moe_(structure, ExpertsConfig(num_experts))
    seen: list[int] = []
    first = next(iter(expert_layers(structure).values()))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    outside = flops_outside_ffns(structure, {key: value for key, value in inputs.items() if key != "attention_mask"})
    handle.remove()
    tokens = seen[0]
    share = outside / (outside + 2 * tokens * dense)
    return Sizes(
        widest.d_model,
        widest.d_ff,
        is_sparse,
        takes_relu,
        parameters,
        num_experts,
        width,
        rank,
        len(ffns),
        least,
        share + (1 - share) * least,
        adapter_for(structure).tells_hidden_states,
    )


def _takes_relu(structure: nn.Module) -> bool:
    """Whether the FFNs can have ReLU, and a file can say so; they have it then."""
    try:
        swap_activation_(structure, ActivationConfig("relu"))
    except ConfigError:
        return False
    return True


def chosen_phases(
    sizes: Sizes, start: Mapping[str, Any], effort: str, needs_head: bool, task: str, num_samples: int
) -> dict[str, Any]:
    """The phases of a recipe.

    Args:
        sizes: Of the model.
        start: ``source`` or ``init_from`` of the first phase.
        effort: ``minutes`` trains nothing but routers; ``hours`` the model as well.
        needs_head: Whether the model has no head for the data yet.
        task: Of pictures, which training changes at random; of vectors, whose loss is small, and beside which hidden
            states are kept; or any other.
        num_samples: Of the training split.
    """
    phases: dict[str, Any] = {}
    tuned = {"optimizer": adamw(learning_rate(sizes.parameters), 0.01)}
    clipped = {"gradient_clip_val": 1.0}
    is_image, is_embedding = task == "image-classification", task == "embeddings"
    kept = {"hidden_weight": 1.0} if is_embedding and sizes.tells_hidden_states else {}
    if effort == "hours":
        swap = {"activation": "relu"} if sizes.takes_relu and not sizes.is_sparse else {}
        if needs_head or swap:
            phases["fine_tuning"] = phase(
                "FineTuning", {**swap, **kept, **tuned}, {"max_epochs": _epochs(32_000, num_samples)} | clipped
            )
        smooth = {} if sizes.is_sparse or swap else {"displacement": 0.0}  # which gives no zeros to count
        alpha = 3e-4 if is_embedding else 1e-3
        phases["sparsity_enforcement"] = phase(
            "SparsityEnforcement",
            {"penalty": "hoyer", "alpha": alpha, "schedule": "warmup", **smooth, **kept, **tuned},
            {"max_epochs": _epochs(48_000, num_samples)} | clipped,
        )
    phases["expert_clustering"] = phase(
        "ExpertClustering", {"num_experts": sizes.num_experts, "split": "activation", "num_samples": 1024}
    )
    epochs = _epochs(80_000, num_samples)
    phases["router_regression"] = phase(
        "RouterRegression",
        {"width": sizes.router_width, "rule": "dynk_max", "optimizer": adamw(2e-3, 0.0), "decay": "cosine"},
        {"max_epochs": epochs, "check_val_every_n_epoch": epochs},
    )
    if is_image:  # as they are, so that what routers see is the same in every epoch, and kept
        phases["router_regression"]["data"] = {"init_args": {"augment": False}}
    phases["stand_in_fitting"] = phase("StandInFitting", {"rank": sizes.rank})
    if effort == "hours":
        epochs = _epochs(32_000, num_samples)
        penalised = {"alpha": 3e-4, "task_weight": 1.0, "beta": 0.0, **kept} if is_embedding else {}
        phases["recovery_tuning"] = phase(
            "RecoveryTuning",
            {**penalised, **tuned},
            {"max_epochs": epochs, "check_val_every_n_epoch": epochs} | clipped,
        )
    quick = effort == "minutes"
    sweep = {"class_path": "TauSweep", "init_args": {"budgets": BUDGETS[1::2] if quick else [*BUDGETS]}}
    few = {"num_samples": 256, "num_scored_samples": 1000, "num_scored_points": 12, "keep": 0.65}
    samples = few if quick else {}
    # not in mixed precision, in which the CPU's operators are not used
    phases["budget_calibration"] = phase("BudgetCalibration", samples, {"precision": "32-true", "callbacks": [sweep]})
    first = next(iter(phases.values()))
    first["model"]["init_args"] |= start
    return phases


def _num_experts(widths: Sequence[int], is_narrow: bool) -> int:
    """The divisor of all widths that is nearest to what gives experts of so many neurons."""
    common = math.gcd(*widths)
    neurons, (least, most) = (NARROW_EXPERT_DIM, NARROW_EXPERTS) if is_narrow else (EXPERT_DIM, EXPERTS)
    wanted = min(max(widths[0] / neurons, least), most)
    divisors = [each for each in range(1, common + 1) if common % each == 0]
    return min(divisors, key=lambda each: abs(math.log(each / wanted)))


def _neurons_cost(ffn: FFN) -> int:
    """Multiply-adds of a dense FFN for one token."""
    return ffn.d_ff * ffn.d_model * (2 if ffn.gate_proj is None else 3)


def learning_rate(parameters: int) -> float:
    """Smaller models take larger steps."""
    return 1e-4 if parameters < 5e7 else 5e-5 if parameters < 2e8 else 2e-5


def _epochs(samples: int, num_samples: int) -> int:
    """So many that about so many samples are seen; one at least, and not too many."""
    return min(max(round(samples / num_samples), 1), 20)


def adamw(lr: float, weight_decay: float) -> dict[str, Any]:
    """What a recipe says of an optimizer."""
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": weight_decay}}


def phase(name: str, init_args: Mapping[str, Any], trainer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a recipe says of a phase, by the name of its class."""
    made: dict[str, Any] = {"model": {"class_path": name, "init_args": dict(init_args)}}
    return made | ({"trainer": dict(trainer)} if trainer else {})
