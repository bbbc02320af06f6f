"""Finding dense FFNs, and what took their place."""

from collections.abc import Callable

from torch import nn

from d2dmoe_pl.adapters import FFN, adapter_for
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.layer import ExpertLayer, MoELayer
from d2dmoe_pl.moe.projections import projection_ffns
from d2dmoe_pl.moe.quantization.int8_layers import check_not_quantized

FilterFn = Callable[[FFN, str], bool]
LayerFilterFn = Callable[[MoELayer, str], bool]


def select_ffns(model: nn.Module, filter_fn: FilterFn | None = None) -> list[FFN]:
    """The dense FFNs of ``model`` that pass ``filter_fn(ffn, name)``, the architecture's own first to last.

    MLPs in the place of attention projections, ``ffn.is_projection``, are among them, after the architecture's own.

    Raises:
        ConfigError: If there are none.
    """
    check_not_quantized(model)
    ffns = [*adapter_for(model).ffns(model), *projection_ffns(model)]
    found = [ffn for ffn in ffns if filter_fn is None or filter_fn(ffn, ffn.name)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no dense FFN found" + (" that the filter admits" if filter_fn else "")
        )
    return found


def moe_layers(model: nn.Module, filter_fn: LayerFilterFn | None = None) -> dict[str, MoELayer]:
    """The MoE layers of ``model`` by name, first to last; empty for a dense model."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
    return {name: layer for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)}


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Every layer of ``model`` that has experts, by name, first to last."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ExpertLayer)}
