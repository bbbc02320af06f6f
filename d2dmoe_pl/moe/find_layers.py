"""Finding dense FFNs, and what took their place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import (
    ADAPTERS,
    FFN,
    LinearRows,
    TransposedLinear,
    adapter_for,
    check_foreign,
    holder_of,
    prove_foreign,
)
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import has_own_forward
from d2dmoe_pl.moe.expert_layer import ExpertLayer
from d2dmoe_pl.moe.experts.activation_kinds import mixes_neurons
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.projections import projection_ffns
from d2dmoe_pl.moe.quantization.int8_layers import check_not_quantized

# what weights of FFNs may be in
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KNOWN_CODE = {"torch", "transformers", "timm", "d2dmoe_pl"}  # libraries whose FFNs the adapters' tests have proved
FilterFn = Callable[[FFN, str], bool]
LayerFilterFn = Callable[[MoELayer, str], bool]


def select_ffns(model: nn.Module, filter_fn: FilterFn | None = None) -> list[FFN]:
    """The dense FFNs of ``model`` that pass ``filter_fn(ffn, name)``, the architecture's own first to last.

    MLPs in the place of attention projections, ``ffn.is_projection``, are among them, after the architecture's own.

    Raises:
        ConfigError: If there are none, or one of them is quantised, adapted, shares weights with something else or
            computes something else than its family's do, or accelerate has put weights elsewhere, or an adapter from
            outside of the package takes one for what it is not.
    """
    check_not_quantized(model)
    check_weights_are_here(model)
    adapter = adapter_for(model)
    own, is_foreign = adapter.ffns(model), not ADAPTERS.is_own(adapter.family)
    if is_foreign:
        check_foreign(adapter, model, own)
    ffns = [*own, *projection_ffns(model)]
    found = [ffn for ffn in ffns if filter_fn is None or filter_fn(ffn, ffn.name)]
    _check_replaceable(model, found)
    unproved = own if is_foreign else [ffn for ffn in found if not ffn.is_projection and _has_own_code(model, ffn)]
    if unproved:
        prove_foreign(adapter, model, unproved, not is_foreign)
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no dense FFN found" + (" that the filter admits" if filter_fn else "")
        )
    return found


def _check_replaceable(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Raise ``ConfigError`` if what has the weights of an FFN is more, or other, than that FFN's own dense layers."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for ffn in ffns:
        parts = [linear for linear in (ffn.up, ffn.gate_proj, ffn.down) if linear is not None]
        for linear in parts:
            holder = holder_of(linear)
            weight: Any = getattr(holder, "weight", None)  # others pack theirs, so that there is none, or a method
            is_plain = isinstance(weight, Tensor) and weight.dtype in TYPES
            check(
                is_plain and not type(weight).__module__.startswith("torchao"),
                f"{ffn.name}: is quantised already, its weights are {getattr(weight, 'dtype', 'packed')} of "
                f"{type(holder).__name__}; must be made into experts first, and then put into int8 by quantize_",
            )
            there = [name for name in ("weight", "bias") if getattr(holder, name, None) is not None]
            computed = [name for name in there if name not in holder._parameters]
            is_linear = isinstance(linear, nn.Linear | TransposedLinear | LinearRows)
            check(
                not (is_linear and computed),
                f"{ffn.name}: the {computed[0] if computed else ''} of its {type(holder).__name__} is computed at each "
                "call, as by pruning or weight_norm, which experts would not do; must be made permanent first, as by "
                "prune.remove, remove_weight_norm or remove_parametrizations",
            )
            check(
                is_linear and {name for name, _ in holder.named_parameters()} <= {"weight", "bias"},
                f"{ffn.name}: its {type(holder).__name__} of {type(holder).__module__} is no plain linear module, and "
                "what it adds to one would be lost; must be merged into one first, as merge_and_unload of PEFT does",
            )
            shared = [name for parameter in holder.parameters() for name in holders.get(id(parameter), ())[1:]]
            check(not shared, f"{ffn.name}: shares weights with {', '.join(shared)}, which would no longer be the same")
        a_neuron = [
            name
            for name, tensor in (*ffn.activation.named_parameters(), *ffn.activation.named_buffers())
            if ffn.d_ff in tensor.shape
        ]
        check(
            not a_neuron,
            f"{ffn.name}: its {ffn.activation_name} has {a_neuron[0] if a_neuron else ''} of a number a neuron; must "
            "have the same for all, as experts have them in another order",
        )
        check(
            not mixes_neurons(ffn.activation, ffn.d_ff),
            f"{ffn.name}: what its {ffn.activation_name} gives for a neuron depends on others; must be elementwise, "
            "since experts are run apart",
        )
        types = sorted({str(holder_of(linear).weight.dtype) for linear in parts})
        check(len(types) == 1, f"{ffn.name}: its weights are {' and '.join(types)}; must be of one type, see model.to")
        others = places[id(model.get_submodule(ffn.name))]
        parents = {id(model.get_submodule(name.rpartition(".")[0])) for name in others}
        check(
            len(parents) == 1, f"{ffn.name}: is the same module as {', '.join(others[1:])}; must have one place alone"
        )


def _has_own_code(model: nn.Module, ffn: FFN) -> bool:
    """Whether an FFN has parts of classes that are from elsewhere than the libraries, or do more than theirs."""
    parts = [holder_of(linear) for linear in (ffn.up, ffn.gate_proj, ffn.down) if linear is not None]
    modules = [*model.get_submodule(ffn.name).modules(), *parts, *ffn.activation.modules()]
    return any(
        type(module).__module__.partition(".")[0] not in KNOWN_CODE
        or (isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward)
        or has_own_forward(module)
        for module in modules
    )


def check_weights_are_here(model: nn.Module) -> None:
    """Raise ``ConfigError`` if accelerate brings weights for each call alone, as ``device_map`` and ``cpu_offload`` do.

    Such weights have no values between calls, so that whatever is made of them would have none.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        is_offloaded = any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))
        check(
            not (is_offloaded and any(parameter.is_meta for parameter in module.parameters(recurse=False))),
            f"{name}: accelerate keeps its weights elsewhere until they are needed; must be loaded whole, without "
            "device_map, or with one that leaves nothing on disk or waiting on the CPU; remove_hook_from_submodules of "
            "accelerate brings them back",
        )


def check_not_adapted(modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ConfigError`` if one of ``modules`` adapts the weights of one in it, as those of PEFT's LoRA do."""
    for name, module in modules.items():
        check(
            not isinstance(getattr(module, "base_layer", None), nn.Module),
            f"{name}: is a {type(module).__name__} that adapts weights, and what it adds would be lost; must be merged "
            "first, as merge_and_unload of PEFT does",
        )


def moe_layers(model: nn.Module, filter_fn: LayerFilterFn | None = None) -> dict[str, MoELayer]:
    """The MoE layers of ``model`` by name, first to last; empty for a dense model."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
    return {name: layer for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)}


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Every layer of ``model`` that has experts, by name, first to last."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ExpertLayer)}
