"""A model compiled ahead of time: programs in files, which run without PyTorch's compiler, and with little Python."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from d2dmoe_pl.data.token_positions import num_token_positions
from d2dmoe_pl.errors import ConfigError, check, one_line, said_of
from d2dmoe_pl.moe.compiled_calls import CompiledCalls, Input, Program, Relation, held_tensors
from d2dmoe_pl.moe.execution.cpu import compile_failure, operators_library
from d2dmoe_pl.moe.experts.experts import leave_inference_mode_
from d2dmoe_pl.moe.find_layers import expert_layers
from d2dmoe_pl.moe.graph_passes import pass_over_graphs
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.looked_up_inputs import looked_up_inputs
from d2dmoe_pl.moe.observed_call import ModelCall, observed_call
from d2dmoe_pl.moe.program_files import (
    CONSTANTS,
    DESCRIPTION,
    FORMAT,
    OPERATORS,
    PROGRAMS,
    checksum,
    made_on,
    ready_programs,
)
from d2dmoe_pl.whole_files import replaced_file

OWN_OPERATORS = ("moe_cpu", "moe_layer_cpu")
SIZE = re.compile(r"L\['values'\]\[(\d+)\]\.size\(\)\[(\d+)\]")  # in what exporting notes of sizes
MOST = torch.iinfo(torch.int64).max
UNKNOWN = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError)  # of the exporter


def write_programs(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> None:
    """Compile ``model`` into files in ``folder``: for one sample, and for several. Nothing of it is trained any more.

    Args:
        model: A model at any stage, on the CPU, in the type that it is to run in.
        batch: As :meth:`Adapter.logits` takes it; of any number of samples, of two tokens a text at least.
        folder: Is there; what it has of programs is replaced.

    Raises:
        ConfigError: If the model is compiled already, or not on the CPU, there is no compiler, it cannot be exported,
            or computes all experts where it is.
    """
    name = type(model).__name__
    check(model._compiled_call_impl is None, f"{name}: is optimised already")
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    check(places <= {"cpu"}, f"{name}: is on {', '.join(sorted(places))}; must be on the CPU, where programs run")
    failure = compile_failure()
    check(failure is None, f"{name}: cannot be compiled ahead of time; the compiler says: {failure}")
    for key, value in batch.items():
        is_there = isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0
        check(is_there, f"batch: {key} is {said_of(value)}; must be a tensor of one sample or more")
        check(
            value.dim() != 2 or value.shape[1] > 1, f"batch: {key} is {said_of(value)}; must be of two tokens or more"
        )
    leave_inference_mode_(model)
    model.eval().requires_grad_(False)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    files: dict[str, Any] = {}
    programs: dict[str, Program] = {}
    literals: dict[str, Tensor] = {}
    call = None
    held = held_tensors(model)  # before it is called: what a call alone makes is in no model that is loaded
    for samples in (1, 2):
        call = observed_call(model, _with_samples(batch, samples))
        exported = _exported(model, call, samples)
        program, constants = _described(exported, call, model)
        literals |= {key: value for key, value in constants.items() if key not in held}
        key = "one" if samples == 1 else "several"
        files[key], programs[key] = _compiled(model, exported, call), program
    assert call is not None
    _, output = pytree.tree_flatten(call.output)
    from torch._inductor.package import package_aoti  # noqa: PLC0415 (takes a second)

    with replaced_file(folder / PROGRAMS) as aside:
        made = aside.with_suffix(".pt2")  # the only ending it takes
        package_aoti(str(made), files)
        made.replace(aside)
    with replaced_file(folder / OPERATORS) as aside:
        shutil.copyfile(operators_library(), aside)
    with replaced_file(folder / CONSTANTS) as aside:
        values = {key: value.detach().clone().contiguous() for key, value in literals.items()}
        safetensors.torch.save_file(values, str(aside))
    described = {
        "format": FORMAT,
        "made_on": made_on(),
        "checksums": {name: checksum(folder / name) for name in (PROGRAMS, OPERATORS)},
        "settings": call.settings,
        "programs": {key: program.as_json() for key, program in programs.items()},
        "output": pytree.treespec_dumps(output),
        "tensors": {key: _kind(value) for key, value in held.items()},
    }
    with replaced_file(folder / DESCRIPTION) as aside:
        aside.write_text(json.dumps(described, indent=1) + "\n")


def attach_programs_(model: nn.Module, folder: Path) -> None:
    """Have calls of ``model`` run by the programs in ``folder``, which were compiled from the same model.

    They read the model's own weights and settings of ``tau``, so that ``set_tau_`` and ``set_budget_`` count. A call
    that no program is for, or of a model that has since got hooks, other modules or weights of another type, is run as
    if there were none, which is said once. Numbers that modules keep beside their weights, such as the epsilon of a
    norm, are not looked at.

    Args:
        model: On the CPU.
        folder: That :func:`write_programs` wrote to.

    Raises:
        ConfigError: If there are no programs, or those of another model, machine or release, or not as written, or
            their operators cannot be had.
    """
    check(model._compiled_call_impl is None, f"{type(model).__name__}: is optimised already")
    described = ready_programs(folder)
    leave_inference_mode_(model)
    model.eval().requires_grad_(False)
    try:
        programs = {key: Program.from_json(made) for key, made in described["programs"].items()}
        output = pytree.treespec_loads(described["output"])
        settings, kinds = dict(described["settings"]), dict(described["tensors"])
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"{str(folder)!r}: {DESCRIPTION} describes no programs ({error!r})") from error
    held = held_tensors(model)
    own = {key: _kind(value) for key, value in held.items()}
    for key, kind in kinds.items():
        check(own.get(key) == kind, f"{str(folder)!r}: was compiled from another model, whose {key} is {kind}")
    from torch._inductor.package import load_package  # noqa: PLC0415 (takes a second)

    tensors = {**safetensors.torch.load_file(str(folder / CONSTANTS)), **held}
    running = []
    for key, program in programs.items():
        run = load_package(str(folder / PROGRAMS), key)
        values = {name: tensors[_own_name(name)] for name in run.get_constant_fqns()}
        run.load_constants(values, check_full_update=True, user_managed=True)
        running.append(replace(program, run=run, held=values))
    model._compiled_call_impl = CompiledCalls(model, running, settings, output)


def _with_samples(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {key: torch.cat([value[:1]] * number) for key, value in batch.items()}


class _ByPlace(nn.Module):
    """A model called by position, tensors in and tensors out, as exporting wants it."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model = model
        self._names, self._settings = tuple(call.tensors), call.settings

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self._names, values, strict=True)), **self._settings)
        return tuple(pytree.tree_leaves(output))


@torch.no_grad()
def _exported(model: nn.Module, call: ModelCall, samples: int) -> torch.export.ExportedProgram:
    name = type(model).__name__
    free = torch.export.Dim.DYNAMIC
    sizes = []
    for value in call.tensors.values():
        is_text = value.dim() == 2
        sizes.append({**({} if samples == 1 else {0: free}), **({1: free} if is_text else {})})
    try:
        exported = torch.export.export(
            _ByPlace(model, call), tuple(call.tensors.values()), dynamic_shapes=(tuple(sizes),)
        )
    except UNKNOWN as error:
        raise ConfigError(
            f"{name}: cannot be compiled ahead of time; PyTorch's exporter says: {one_line(str(error))}"
        ) from error
    check(
        hasattr(exported, "_guards_code"),
        f"{name}: cannot be compiled ahead of time; PyTorch {torch.__version__} does not say what sizes it holds for",
    )
    layers = sum(not isinstance(layer, MoELayer) or layer.gate is not None for layer in expert_layers(model).values())
    own = sum(1 for node in exported.graph.nodes if getattr(node.target, "_opname", None) in OWN_OPERATORS)
    check(
        own >= layers,
        f"{name}: of its {layers} layers that choose experts, {layers - own} would compute all of them ahead of time; "
        "must have experts, routers and gates that this package's operators run",
    )
    return exported


def _described(
    exported: torch.export.ExportedProgram, call: ModelCall, model: nn.Module
) -> tuple[Program, dict[str, Tensor]]:
    """What a program takes, and the tensors that it reads, by their names in the model."""
    rows, of_positions = looked_up_inputs(exported)
    if of_positions is not None and hasattr(model, "config"):
        of_positions = num_token_positions(model)  # some do not begin with the first, and T5's table is of distances
    longest = of_positions or MOST
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(call.tensors) :]
    inputs = []
    for node, (name, value) in zip(placeholders, call.tensors.items(), strict=True):
        sizes: list[int | tuple[str, int, int]] = []
        for place, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                sizes.append(size)
                continue
            limits = exported.range_constraints[size.node.expr]
            most = longest if place == 1 else MOST
            sizes.append((str(size), int(limits.lower), int(min(limits.upper, most))))
        inputs.append(Input(name, str(value.dtype).removeprefix("torch."), tuple(sizes), rows.get(node)))
    relations = tuple(Relation(SIZE.sub(r"size_\1_\2", guard)) for guard in exported._guards_code)
    constants = {_own_name(name): value for name, value in exported.constants.items()}
    return Program(tuple(inputs), relations), constants


def _compiled(model: nn.Module, exported: torch.export.ExportedProgram, call: ModelCall) -> Any:
    from torch._inductor import aot_compile  # noqa: PLC0415 (takes a second)

    options = {
        "post_grad_custom_pre_pass": pass_over_graphs(),
        "size_asserts": False,
        "always_keep_tensor_constants": True,  # a small one, such as tau, is else a number for ever
        "cpp.dynamic_threads": True,  # else as many as here
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
    }
    try:
        module: Any = exported.module(check_guards=False)
        for name in exported.constants:  # only buffers are asked for by name when it runs
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if leaf not in owner._buffers:
                value = getattr(owner, leaf)
                delattr(owner, leaf)
                owner.register_buffer(leaf, value, persistent=False)
        return aot_compile(module, tuple(call.tensors.values()), options=options)
    except UNKNOWN as error:
        raise ConfigError(
            f"{type(model).__name__}: cannot be compiled ahead of time; PyTorch's compiler says: {one_line(str(error))}"
        ) from error


def _own_name(name: str) -> str:
    return name.removeprefix("model.")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
