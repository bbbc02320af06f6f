"""Artifacts with programs: a model that is compiled once, and runs wherever the processor can do the same."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, read_artifact, save_artifact
from d2dmoe_pl.artifact_parts import PhaseRecord
from d2dmoe_pl.moe.ahead_of_time import attach_programs_, write_programs
from d2dmoe_pl.moe.program_files import ready_programs
from d2dmoe_pl.weights_types import floating_type

LENGTH = 8  # tokens of the noise that shows how a model is called; programs are for any number of them
BESIDE_IDS = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}  # of one text without padding


def save_compiled(
    model: nn.Module,
    path: str | Path,
    batch: Mapping[str, Tensor] | None = None,
    history: Sequence[PhaseRecord] = (),
    save_processor: Callable[[Path], None] | None = None,
) -> None:
    """Write ``model`` to the folder ``path``, as :func:`save_artifact` does, with programs compiled from it.

    It takes about a minute. The operators of this package that they call lie beside them, so that no compiler is needed
    where they run. There is a program for one sample, and one for more, of texts of two tokens or more.
    ``tau`` and budgets stay free; the gating rule, the types and the arguments that the model is called with do not.

    Args:
        model: A model at any stage, on the CPU, in the type that it is to run in. Its MoE layers have experts that this
            package's operators run. It is set to evaluation, without gradients.
        path: The folder; an artifact that is there is replaced.
        batch: What the model will be given, such as ``input_ids`` and ``attention_mask``, of two tokens a text at
            least; if not given, noise, with all that tokenizers give such a model.
        history: As of :func:`save_artifact`.
        save_processor: As of :func:`save_artifact`.

    Raises:
        ConfigError: As :func:`save_artifact`; or if there is no compiler, or PyTorch cannot export the model.

    Example:
        >>> import tempfile, timm, torch
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, load_compiled, save_compiled
        >>> model = timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1)
        >>> model.model_args = {"embed_dim": 12, "depth": 1, "num_heads": 1}
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> folder = tempfile.mkdtemp() + "/compiled"
        >>> save_compiled(model, folder)
        >>> load_compiled(folder)(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    given = noise_for(model) if batch is None else batch

    def save_beside(aside: Path) -> None:
        if save_processor is not None:
            save_processor(aside)
        write_programs(model, given, aside)

    save_artifact(model, path, history, save_beside)


def noise_for(model: nn.Module, names: Collection[str] = BESIDE_IDS) -> dict[str, Tensor]:
    """A batch of two samples of noise, in the type that ``model`` is in.

    Texts have those of ``names``, of what tokenizers give beside ids, that the model takes.
    """
    floating = floating_type(model)
    adapter = adapter_for(model)
    batch = adapter.random_inputs(model, 2, LENGTH)
    if "input_ids" in batch:
        takes = {*getattr(adapter, "inputs", ())} & {*inspect.signature(model.forward).parameters}
        for name, made in BESIDE_IDS.items():
            if name in names and name in takes:
                batch.setdefault(name, made(batch["input_ids"]))
    return {key: value.to(floating) if value.is_floating_point() else value for key, value in batch.items()}


def load_compiled(path: str | Path) -> nn.Module:
    """The model that :func:`save_compiled` wrote to ``path``, whose calls its programs run; on the CPU.

    It is the model that :func:`load_model` gives, and can be used as that: ``set_tau_`` and ``set_budget_`` count. A
    call that no program is for, such as one with other arguments, or of a model that was given hooks, is run as if
    there were none, which is said once. What modules keep beside weights, such as the epsilon of a norm, is as it was.

    Programs are native code: take them from where you would take a program.

    Args:
        path: A folder.

    Raises:
        ConfigError: If ``path`` is no whole artifact, has no programs, or such as are for another release of PyTorch or
            of this package, or for a processor that can do what this one cannot.

    Example:
        >>> from d2dmoe_pl import ConfigError, load_compiled
        >>> try:  # save_compiled has one that is there
        ...     load_compiled("nowhere")
        ... except ConfigError as error:
        ...     print(error)
        path='nowhere': no such folder; must be the artifact that a phase wrote
    """
    folder = Path(path)
    read_artifact(folder, "path")
    ready_programs(folder)  # before the weights, whose layers would compile operators of their own
    model = load_model(folder)
    attach_programs_(model, folder)
    return model
