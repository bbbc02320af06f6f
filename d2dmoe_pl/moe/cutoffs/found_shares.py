"""What cutoffs are to leave out of each layer for a budget: what does the least harm, as far as one gradient tells."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.budgets.allocation import additive_path
from d2dmoe_pl.moe.budgets.output_gradients import output_gradients
from d2dmoe_pl.moe.conversion import check_chosen, select_moe_layers
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.way_down import SITES, Reduce, Way, way_down
from d2dmoe_pl.moe.find_layers import LayerFilterFn
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.typed_settings import check_types_

TOKENS = 2048  # of a process and a layer, that are looked at; evenly spaced among all

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class CutoffSearch:
    """A budget, and which shares are to be found for it.

    Attributes:
        ffn_flops: Share of the dense FFNs' FLOPs, in (0, 1), that experts and cutoffs are to come down to together.
        inputs: As in :class:`~d2dmoe_pl.moe.cutoffs.cutoffs.CutoffConfig`, for all layers; None for each layer's own.
        hidden: The same.
        full_tau: As there.
        gate_proj: The same as ``inputs``.

    Raises:
        ConfigError: If one of them lies outside its range.
    """

    ffn_flops: float = 0.375
    inputs: float | None = None
    hidden: float | None = None
    full_tau: float = 0.95
    gate_proj: float | None = None

    def __post_init__(self) -> None:
        check_types_(self)
        check(
            0 < self.ffn_flops < 1, f"ffn_flops={self.ffn_flops}: must lie in (0, 1), a share of the dense FFNs' FLOPs"
        )
        _ = self.start  # checks the others

    @property
    def start(self) -> CutoffConfig:
        """What is given, and nothing left out of what is not."""
        inputs, hidden, gate_proj = (
            1.0 if share is None else share for share in (self.inputs, self.hidden, self.gate_proj)
        )
        return CutoffConfig(inputs, hidden, self.full_tau, gate_proj)

    def free(self, is_gated: bool) -> list[str]:
        """The shares that are to be found, by name."""
        return [site for site in SITES if getattr(self, site) is None and (is_gated or site != "gate_proj")]


def find_cutoff_shares(
    model: nn.Module,
    config: CutoffSearch,
    filter_fn: LayerFilterFn | None = None,
    *,
    batches: Iterable[tuple[Callable[[], object], Loss]],
    reduce: Reduce = lambda sums: sums,
) -> dict[str, CutoffConfig]:
    """The cutoffs of each layer that, with a choice of experts, come to a budget with the least harm.

    From the dense layer, one share or the number of experts is lowered at a time: what adds the least divergence per
    FLOP that it saves. The layers' ways down are then gone together to the budget, again by divergence per FLOP, as
    TEAL (arXiv 2408.14690) goes by the errors of a block. What a step adds to the divergence is what it changes along
    the gradient of a likelihood, squared; see :class:`~d2dmoe_pl.moe.budgets.second_order.SecondOrder`.

    Args:
        model: With routers and gates, whose settings stay; in evaluation mode. Cutoffs that it has are not looked at.
        config: The budget, and shares that are given.
        filter_fn: ``(layer, name) -> bool``; which layers to find cutoffs for, all if not given.
        batches: Of calibration samples; for each what calls the model on it, and what does so and gives a loss that has
            gradients, see :meth:`~d2dmoe_pl.data.Task.curvature_loss`. Some two thousand tokens of each layer are held.
        reduce: Sums a tensor over processes.

    Returns:
        By the layers' names, with those halfway to the budget. One that no token comes to has what is given, and leaves
        out nothing else.

    Raises:
        ConfigError: If there is no MoE layer, or one without a router or a gate.
    """
    layers = select_moe_layers(model, filter_fn)
    check_chosen(layers)
    before = {name: (layer.cutoffs, layer.get_gate().config) for name, layer in layers.items()}
    for layer in layers.values():
        layer.cutoffs = None
    try:
        ways = _ways(model, list(layers.values()), config, [*batches], reduce)
    finally:
        for name, layer in layers.items():
            layer.cutoffs, setting = before[name]
            layer.get_gate().set_config(setting)
    taken = iter(_at_budget([way for way in ways if way is not None], config.ffn_flops))
    return {name: config.start if way is None else next(taken) for name, way in zip(layers, ways, strict=True)}


def _ways(
    model: nn.Module,
    layers: list[MoELayer],
    config: CutoffSearch,
    batches: list[tuple[Callable[[], object], Loss]],
    reduce: Reduce,
) -> list[Way | None]:
    """Of each layer; None of one that no token came to."""
    held: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    every = 1

    def hold(index: int, tokens: Tensor, slopes: Tensor) -> None:
        nonlocal every
        if index == 0 and not held[0][0]:
            every = max(1, len(tokens) * len(batches) // TOKENS)
        held[index][0].append(tokens[::every].clone())
        held[index][1].append(slopes[::every].clone())

    for run, loss in batches:
        output_gradients(model, layers, run, loss, hold)
    ways: list[Way | None] = [None] * len(layers)

    def find(index: int, layer: nn.Module, args: object, output: object) -> None:
        if held[index][0]:  # else it is called once more
            tokens, slopes = map(torch.cat, held[index])
            held[index] = ([], [])
            with torch.autocast(tokens.device.type, enabled=False):
                ways[index] = way_down(
                    layers[index],
                    config.start,
                    config.free(layers[index].own_experts.is_gated),
                    config.ffn_flops / 2,
                    tokens,
                    slopes,
                    reduce,
                )

    # inside a call, in which weights that are sharded are whole
    with torch.no_grad(), hooked(each.register_forward_hook(partial(find, at)) for at, each in enumerate(layers)):
        for run, _ in batches[-1:]:
            run()
    return ways


def _at_budget(ways: list[Way], ffn_flops: float) -> list[CutoffConfig]:
    """Where on its way each layer is when all are first down to the budget, or as near as they come; and halfway."""
    of_layers = [way.points for way in ways]
    path = additive_path(
        [[float(place) for place in range(len(points))] for points in of_layers],
        [[point.divergence for point in points] for points in of_layers],
        [[point.flops for point in points] for points in of_layers],
    )
    dense = sum(way.dense_flops for way in ways)

    def at(share: float) -> list[CutoffConfig]:
        reached = next((each for each in path if each.cost <= share * dense), path[-1])
        return [points[int(place)].config for points, place in zip(of_layers, reached.taus, strict=True)]

    return [
        replace(full, halfway=(half.inputs, half.hidden, half.gate_proj))
        for full, half in zip(at(ffn_flops), at((1 + ffn_flops) / 2), strict=True)
    ]
