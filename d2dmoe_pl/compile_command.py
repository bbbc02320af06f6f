"""``compile``: loads a model in the type that it is to run in, compiles it ahead of time, and tries what came of it."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from transformers import AutoTokenizer

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, read_artifact
from d2dmoe_pl.artifact_parts import copy_processor
from d2dmoe_pl.chain_status import say
from d2dmoe_pl.compile_arguments import AROUND, DTYPES
from d2dmoe_pl.compiled_artifact import load_compiled, noise_for, save_compiled
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.budgets.budget_path import set_budget_
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.quantization.int8_layers import quantized_names
from d2dmoe_pl.weights_types import floating_type
from d2dmoe_pl.whole_files import named_folder

# how far vectors of predictions may lie apart, relative to their lengths: where types round, gates may choose otherwise
EXACT, ROUNDED = 1e-3, 0.5


def run_compile(config: Namespace) -> None:
    """Compile a model ahead of time, and see on noise that its programs give what it gives.

    Args:
        config: What :func:`d2dmoe_pl.compile_arguments.compile_parser` parsed.

    Raises:
        ConfigError: For a wrong setting, or as :func:`d2dmoe_pl.save_compiled`.
    """
    check(config.artifact is not None, "artifact=None: must be the folder artifact that a phase left")
    dtype, around = config.dtype, config.around
    check(dtype is None or dtype in DTYPES, f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    check(around in AROUND, f"around={around!r}: allowed are {', '.join(AROUND)}")
    check(
        around == AROUND[0] or dtype == "int8",
        f"around={around!r}: is the type around int8; must go, or --dtype int8 be there",
    )
    check(
        config.tau is None or config.budget is None,
        f"tau={config.tau}, budget={config.budget}: must be one of them",
    )
    artifact = read_artifact(config.artifact, "artifact")
    folder = named_folder(config.output_dir, "output_dir")
    check(
        folder.resolve() != artifact.path.resolve(),
        f"output_dir={config.output_dir!r}: is the artifact that is compiled; must be another folder",
    )
    model = load_model(artifact.path, dtype=dtype)
    if around != AROUND[0]:
        adapter_for(model).cast_(model, getattr(torch, around))
    if config.tau is not None:
        set_tau_(model, config.tau)
    if config.budget is not None:
        set_budget_(model, ffn_flops=config.budget)
    batch = _noise(model, artifact.path)
    say("compiling, about a minute: a program for one sample, and one for several")
    save_compiled(model, folder, batch, artifact.history, lambda aside: copy_processor(artifact.path, aside))
    _check_predictions(load_compiled(folder), model, batch)
    say(f'Compiled: {folder}; load_compiled("{folder}") loads it.')


def _noise(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A batch with what the tokenizer beside the model gives to it, where there is one."""
    if not any(folder.glob("tokenizer*")):
        return noise_for(model)
    return noise_for(model, load_pretrained(AutoTokenizer, str(folder), "artifact").model_input_names)


@torch.inference_mode()
def _check_predictions(compiled: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Raise ``ConfigError`` unless there are programs for one sample and for several that give what ``model`` gives.

    Up to the rounding of its types, that is.
    """
    floating = floating_type(model)
    is_exact = floating == torch.float32 and not quantized_names(model)
    for samples in (1, len(next(iter(batch.values())))):
        given = {name: value[:samples] for name, value in batch.items()}
        expected, got = (adapter_for(each).logits(each, given).float() for each in (model, compiled))
        difference = ((got - expected).norm() / expected.norm()).item()
        check(
            difference <= (EXACT if is_exact else ROUNDED),
            f"{type(model).__name__}: what was compiled differs by {difference:.1%} on noise; must not be used",
        )
    calls: Any = compiled._compiled_call_impl
    check(
        not calls.passed_over,
        f"{type(model).__name__}: no program takes what the model is called with ({'; '.join(calls.passed_over)})",
    )
