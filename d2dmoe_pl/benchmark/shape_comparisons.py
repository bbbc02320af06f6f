"""Comparisons over FFNs of a given shape and random weights, and over a Vision Transformer made of them."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from d2dmoe_pl.adapters import FFN, TimmModel, adapter_for
from d2dmoe_pl.benchmark.compared_modules import Choice, layer_comparison, layer_inputs, model_comparison
from d2dmoe_pl.benchmark.comparison import Comparison, Settings
from d2dmoe_pl.benchmark.preset_masks import preset_masks, random_mask
from d2dmoe_pl.benchmark.runtimes import RUNTIMES
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.moe.activations import ActivationConfig, swap_activation_
from d2dmoe_pl.moe.conversion import (
    ExpertsConfig,
    add_routers_,
    convert_to_moe_,
    set_backend_,
    set_gate_,
    temporary_gate,
)
from d2dmoe_pl.moe.experts.experts import Experts
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.optimization import optimize_
from d2dmoe_pl.moe.quantization.quantize import quantize_, quantize_layer_
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moe.token_context import TokenContext

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Shape:
    """FFNs, and the model that is made of them.

    Attributes:
        d_model: Width of the tokens.
        d_ff: Neurons of an FFN.
        num_experts: ``E``, one or more values.
        gated: Whether FFNs are gated.
        activation: Name in ``ACTIVATIONS``.
        router_width: Hidden neurons of routers; 0 for none.
        tokens: How many a layer is given.
        share: Of all (token, expert) pairs, those that run.
        architecture: timm model that gives the whole model all but its widths and depth.
        layers: Depth of the whole model.

    Raises:
        ConfigError: For values out of range.
    """

    d_model: int
    d_ff: int
    num_experts: list[int]
    gated: bool
    activation: str
    router_width: int
    tokens: list[int]
    share: list[float]
    architecture: str
    layers: int

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "layers"):
            value = getattr(self, name)
            check(value > 0, f"{name}={value}: must be positive")
        for experts in self.num_experts:
            check(
                experts > 0 and self.d_ff % experts == 0,
                f"num_experts={experts}: must divide the FFN width, which is {self.d_ff}",
            )
        check(self.activation in ACTIVATIONS, f"activation={self.activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        check(self.router_width >= 0, f"router_width={self.router_width}: must be positive, or 0 for no router")
        for tokens in self.tokens:
            check(tokens > 0, f"tokens={tokens}: must be positive")
        for share in self.share:
            check(0.0 < share <= 1.0, f"share={share}: must lie in (0, 1], a share of the experts")


def shape_comparisons(shape: Shape, settings: Settings) -> Iterator[Comparison]:
    """Every combination of dtype, number of experts, and tokens; or of experts and batch size, all types at once.

    Raises:
        ConfigError: For a whole model of gated FFNs, which the architecture does not have.
    """
    check(
        not (shape.gated and "model" in settings.scope),
        "gated=True: the whole model's FFNs cannot be gated; must be False, or --scope layer",
    )
    if "layer" in settings.scope:
        for dtype in settings.dtype:
            for num_experts in shape.num_experts:
                yield from _layer_comparisons(shape, num_experts, settings, dtype)
    if "model" in settings.scope:
        for num_experts in shape.num_experts:
            yield from _model_comparisons(shape, num_experts, settings)


def random_ffn(shape: Shape) -> FFN:
    """A dense FFN with random weights."""
    return FFN(
        name="ffn",
        up=nn.Linear(shape.d_model, shape.d_ff),
        activation=ACTIVATIONS[shape.activation](),
        down=nn.Linear(shape.d_ff, shape.d_model),
        gate_proj=nn.Linear(shape.d_model, shape.d_ff) if shape.gated else None,
    )


def random_model(shape: Shape) -> nn.Module:
    """A dense Vision Transformer of these FFNs with random weights.

    Raises:
        ConfigError: If the architecture is unknown, or is none whose widths and depth can be chosen.
    """
    source = TimmModel(
        shape.architecture,
        embed_dim=shape.d_model,
        depth=shape.layers,
        num_heads=shape.d_model // math.gcd(shape.d_model, 64),
        mlp_ratio=(shape.d_ff + 0.5) / shape.d_model,  # timm rounds d_model * mlp_ratio down
    )
    try:
        model = source.build([str(label) for label in range(1000)]).eval()
    except TypeError as error:  # timm hands what it is given to the model's constructor
        raise ConfigError(
            f"architecture={shape.architecture!r}: must be a model with embed_dim, depth, num_heads and mlp_ratio "
            f"({error})"
        ) from error
    swap_activation_(model, ActivationConfig(shape.activation))
    return model


def _layer_comparisons(shape: Shape, num_experts: int, settings: Settings, dtype: torch.dtype) -> Iterator[Comparison]:
    ffn = random_ffn(shape)
    layer = MoELayer(Experts(ffn, num_experts, None, settings.backend), TokenContext(), nn.Identity()).eval()
    _route_(layer, shape)
    floating = _cast_(layer, dtype, settings)
    part: Any
    for part in filter(None, (ffn.up, ffn.down, ffn.gate_proj)):
        part.to(settings.device, floating)
    for tokens in shape.tokens:
        x = torch.randn(tokens, shape.d_model, device=settings.device, dtype=floating)
        plain, routed = _choices(layer, {"": tokens}, shape)
        compare = {name: plain for name in settings.compare if name not in RUNTIMES}
        yield layer_comparison(f"{shape.d_model} x {shape.d_ff}", ffn, layer, x, [*plain, *routed], compare)


def _model_comparisons(shape: Shape, num_experts: int, settings: Settings) -> Iterator[Comparison]:
    dense = random_model(shape).to(settings.device, settings.dense_dtype)
    moes = {}
    for dtype in settings.dtype:
        moe = copy.deepcopy(dense)
        convert_to_moe_(moe, ExpertsConfig(num_experts))
        set_backend_(moe, settings.backend)
        _route_(moe, shape)
        _cast_(moe, dtype, settings)
        moes[dtype] = moe
    plain = moes.get(settings.dense_dtype)
    if plain is None:
        plain = copy.deepcopy(dense)
        convert_to_moe_(plain, ExpertsConfig(num_experts))
    for batch_size in settings.batch_size:
        noise = adapter_for(dense).random_inputs(dense, batch_size, length=1)
        batches = {
            dtype: [{key: value.to(settings.device, dtype) for key, value in noise.items()}]
            for dtype in {settings.dense_dtype, *map(settings.floating, settings.dtype)}
        }
        first = next(iter(moes))
        inputs = layer_inputs(moes[first], batches[settings.floating(first)][0])
        positions = {name: len(given.tokens) for name, given in inputs.items()}
        choices = {}
        for dtype, moe in moes.items():
            choices[dtype] = [choice for each in _choices(moe, positions, shape) for choice in each]
            if settings.optimize and moe._compiled_call_impl is None:
                optimize_(moe)
        rivals = {
            name: RUNTIMES[name](dense, batches[settings.dense_dtype]) for name in settings.compare if name in RUNTIMES
        }
        yield model_comparison(
            dense, moes, batches, [inputs], choices, rivals, plain=None if settings.optimize else plain
        )


def _cast_(module: nn.Module, dtype: torch.dtype, settings: Settings) -> torch.dtype:
    """Have a model, or a layer, with experts in ``dtype``; the type of what it is given then."""
    if not dtype.is_floating_point:
        if isinstance(module, MoELayer):
            quantize_layer_(module)
        else:
            quantize_(module)
    floating = settings.floating(dtype)
    module.to(settings.device, floating)
    return floating


def _route_(module: nn.Module, shape: Shape) -> None:
    if shape.router_width:
        add_routers_(module, RouterConfig(shape.router_width))
        set_gate_(module, GateConfig(tau=0.5))  # any but 1, which may be a shortcut


def _choices(module: nn.Module, tokens: Mapping[str, int], shape: Shape) -> tuple[list[Choice], list[Choice]]:
    """The preset choices at each share, without routers and with them; none of the latter where there is no router."""
    layers = moe_layers(module)
    device = next(iter(layers.values())).experts.up_weight.device
    plain, routed = [], []
    for share in shape.share:
        masks = {
            name: random_mask(tokens[name], layer.experts.num_experts, share, device) for name, layer in layers.items()
        }
        plain.append(Choice(partial(preset_masks, layers, masks), router=False))
        if shape.router_width:
            # so many experts as the share says, chosen by the router, which is random too
            routed.append(Choice(partial(temporary_gate, module, GateConfig("topk", tau=share)), router=True))
    return plain, routed
