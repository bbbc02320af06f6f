"""Finding dense FFNs, and what took their place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from d2dmoe_pl.moe.expert_layer import ExpertLayer
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.projections import projection_ffns
from d2dmoe_pl.moe.quantization.int8_layers import check_not_quantized

FilterFn = Callable[[FFN, str], bool]
LayerFilterFn = Callable[[MoELayer, str], bool]


def select_ffns(model: nn.Module, filter_fn: FilterFn | None = None) -> list[FFN]:
    """The dense FFNs of ``model`` that pass ``filter_fn(ffn, name)``, the architecture's own first to last.

    MLPs in the place of attention projections, ``ffn.is_projection``, are among them, after the architecture's own.

    Raises:
        ConfigError: If there are none, or one is quantised or shares weights with something else, or accelerate has put
            weights elsewhere, or an adapter from outside of the package takes one for what it is not.
    """
    check_not_quantized(model)
    check_weights_are_here(model)
    adapter = adapter_for(model)
    own, is_foreign = adapter.ffns(model), not ADAPTERS.is_own(adapter.family)
    if is_foreign:
        check_foreign(adapter, model, own)
    ffns = [*own, *projection_ffns(model)]
    _check_replaceable(model, ffns)
    if is_foreign:
        prove_foreign(adapter, model, own)
    found = [ffn for ffn in ffns if filter_fn is None or filter_fn(ffn, ffn.name)]
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
            is_plain = isinstance(weight, Tensor) and weight.is_floating_point()
            check(
                is_plain and not type(weight).__module__.startswith("torchao"),
                f"{ffn.name}: is quantised already, its weights are {getattr(weight, 'dtype', 'packed')} of "
                f"{type(holder).__name__}; must be made into experts first, and then put into int8 by quantize_",
            )
            check(
                isinstance(linear, nn.Linear | TransposedLinear | LinearRows),
                f"{ffn.name}: its {type(holder).__name__} of {type(holder).__module__} is no plain linear module, and "
                "what it adds to one would be lost; must be merged into one first, as merge_and_unload of PEFT does",
            )
            shared = [name for parameter in holder.parameters() for name in holders.get(id(parameter), ())[1:]]
            check(not shared, f"{ffn.name}: shares weights with {', '.join(shared)}, which would no longer be the same")
        types = sorted({str(holder_of(linear).weight.dtype) for linear in parts})
        check(len(types) == 1, f"{ffn.name}: its weights are {' and '.join(types)}; must be of one type, see model.to")
        others = places[id(model.get_submodule(ffn.name))]
        parents = {id(model.get_submodule(name.rpartition(".")[0])) for name in others}
        check(
            len(parents) == 1, f"{ffn.name}: is the same module as {', '.join(others[1:])}; must have one place alone"
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
