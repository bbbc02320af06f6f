"""What is measured: a layer or a model with experts, with its choice among them set from outside."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters import FFN, TransposedLinear, adapter_for
from d2dmoe_pl.benchmark.alternatives import ALTERNATIVES
from d2dmoe_pl.benchmark.comparison import Comparison, Way
from d2dmoe_pl.benchmark.timing import Contender
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops, skipped
from d2dmoe_pl.moe.execution import BACKENDS, Backend
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.token_context import real_tokens


@dataclass(frozen=True)
class Choice:
    """How experts are chosen while something is timed.

    Attributes:
        context: Sets the choice.
        router: Whether routers and gates run.
        tau: The gates' setting; None for preset masks.
    """

    context: Callable[[], AbstractContextManager]
    router: bool
    tau: float | None = None


@dataclass(frozen=True)
class LayerInput:
    """What a MoE layer is given.

    Attributes:
        tokens: Those that are no padding, ``(N, d_model)``.
        positions: How many there are with padding, which the dense FFN computes too.
    """

    tokens: Tensor
    positions: int


def find_way(name: str) -> Backend:
    """The backend ``name``, of ``benchmark/alternatives`` or of those that models run on.

    Raises:
        ConfigError: If there is none.
    """
    allowed = [*ALTERNATIVES.names(), *BACKENDS.names()]
    check(name in allowed, f"compare={name!r}: allowed are {', '.join(allowed)}")
    return (ALTERNATIVES if name in ALTERNATIVES.names() else BACKENDS).find(name, "compare")


def run_dense(ffn: FFN, tokens: Tensor) -> Tensor:
    """The dense FFN, as its architecture computes it: ``(N, d_model)`` to the same shape."""
    up, down = (linear.module if isinstance(linear, TransposedLinear) else linear for linear in (ffn.up, ffn.down))
    if ffn.gate_proj is None:
        return down(ffn.activation(up(tokens)))
    return down(ffn.activation(ffn.gate_proj(tokens)) * up(tokens))


@torch.no_grad()
def layer_inputs(model: nn.Module, batch: Batch) -> dict[str, LayerInput]:
    """What each MoE layer is given in one call of the model, by the layer's name."""
    found: dict[str, LayerInput] = {}

    def register(name: str, layer: MoELayer) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            positions = args[0].flatten(0, -2)  # (B * L, d)
            found[name] = LayerInput(real_tokens(positions, layer.context.token_index), len(positions))

        return layer.register_forward_pre_hook(hook)

    with hooked(register(name, layer) for name, layer in moe_layers(model).items()):
        adapter_for(model).logits(model, batch)
    return found


@torch.no_grad()
def way(name: str, choice: Choice, module: nn.Module, call: Callable[[], object], positions: Mapping[str, int]) -> Way:
    """One way to be timed, after one call to see what share of the experts runs.

    Args:
        name: Of the backend.
        choice: How experts are chosen.
        module: A model, or a MoE layer.
        call: Runs it.
        positions: Of each MoE layer in ``module``, how many positions its dense FFN would compute.
    """
    masks: dict[str, Tensor] = {}
    layers = moe_layers(module)
    with choice.context(), hooked(layer.watch(partial(masks.__setitem__, key)) for key, layer in layers.items()):
        call()
    pairs = {key: int(mask.sum()) for key, mask in masks.items()}
    flops = sum(
        pairs[key] * pair_flops(layer.experts) + (layer.routing_flops(len(masks[key]), 1) if choice.router else 0)
        for key, layer in layers.items()
    )
    dense_flops = sum(positions[key] * dense_ffn_flops(layer.experts) for key, layer in layers.items())
    return Way(
        name=name,
        router=choice.router,
        tau=choice.tau,
        share=sum(pairs.values()) / sum(mask.numel() for mask in masks.values()),
        cost=flops / dense_flops,
        contender=Contender(call, choice.context),
    )


def layer_comparison(
    name: str, ffn: FFN, layer: MoELayer, tokens: Tensor, choices: list[Choice], compare: Mapping[str, list[Choice]]
) -> Comparison:
    """A MoE layer against its dense FFN, on the same tokens.

    Args:
        name: Of the layer.
        ffn: The dense FFN.
        layer: Its backend is set.
        tokens: ``(N, d_model)``.
        choices: To be timed with the layer's own backend.
        compare: To be timed with other ways, by their names.
    """
    positions = {"": len(tokens)}

    def other(function: Backend) -> Callable[[], Tensor]:
        return lambda: function(layer.experts, tokens, layer.get_gate()(layer.get_router()(tokens)))

    own = [way(layer.experts.backend, choice, layer, lambda: layer(tokens), positions) for choice in choices]
    others = [
        way(key, choice, layer, other(find_way(key)), positions) for key, some in compare.items() for choice in some
    ]
    return Comparison(
        scope="layer",
        name=name,
        dtype=tokens.dtype,
        num_experts=layer.experts.num_experts,
        batch_size=None,
        tokens=len(tokens),
        dense=Contender(lambda: run_dense(ffn, tokens)),
        ways=[*own, *others],
    )


def model_comparison(
    dense: nn.Module, moe: nn.Module, batch: Batch, inputs: Mapping[str, LayerInput], choices: list[Choice]
) -> Comparison:
    """A model with experts against its dense twin, on the same batch.

    Args:
        dense: The dense model.
        moe: The same with experts; its backend is set.
        batch: Samples in the first dimension.
        inputs: What :func:`layer_inputs` gave.
        choices: To be timed.
    """
    layers = moe_layers(moe)
    first, experts = next(iter(inputs.values())), next(iter(layers.values())).experts
    positions = {name: given.positions for name, given in inputs.items()}

    def call(model: nn.Module) -> Callable[[], Tensor]:
        adapter = adapter_for(model)
        return lambda: adapter.logits(model, batch)

    return Comparison(
        scope="model",
        name=type(dense).__name__,
        dtype=first.tokens.dtype,
        num_experts=experts.num_experts,
        batch_size=len(next(iter(batch.values()))),
        tokens=len(first.tokens),
        dense=Contender(call(dense)),
        ways=[way(experts.backend, choice, moe, call(moe), positions) for choice in choices],
        rest=Contender(call(moe), lambda: skipped(layers.values())),
    )
