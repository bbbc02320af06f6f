"""The way down of one layer: which of its settings to lower next, cutoffs or experts, for the least harm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS, shares_at, tau_grid
from d2dmoe_pl.moe.budgets.output_gradients import along_gradients
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, cut
from d2dmoe_pl.moe.cutoffs.fitting import Magnitudes
from d2dmoe_pl.moe.layer import MoELayer

KEEP = 0.9  # of a share, at each step down
KEEP_EXPERTS = 0.75  # of those that run
LEAST_SHARE = 0.05
SITES = ("inputs", "hidden", "gate_proj")

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    """On the way down of one layer.

    Attributes:
        config: Of its cutoffs.
        tau: Of its gate.
        divergence: That it adds, summed over tokens.
        flops: Of the layer, likewise.
    """

    config: CutoffConfig
    tau: float
    divergence: float
    flops: float


@dataclass(frozen=True)
class Way:
    """Of one layer.

    Attributes:
        points: From where nothing is left out but what is given, each cheaper than the one before.
        dense_flops: Of its dense FFN, summed over tokens.
    """

    points: list[Point]
    dense_flops: float


def way_down(
    layer: MoELayer,
    start: CutoffConfig,
    free: Sequence[str],
    ffn_flops: float,
    tokens: Tensor,
    slopes: Tensor,
    reduce: Reduce = lambda sums: sums,
) -> Way | None:
    """One step of one setting at a time, that which adds the least divergence per FLOP that it saves.

    Args:
        layer: With a router, and a gate at ``tau`` 1, where it stays; without cutoffs.
        start: Of the cutoffs, at first. Up to its ``full_tau`` experts are chosen, or all run.
        free: Which of its shares are lowered, by name.
        ffn_flops: Where to stop, as a share of the dense FFN's FLOPs.
        tokens: ``(N, d_model)``.
        slopes: Gradients at the layer's outputs, ``(N, d_out)``.
        reduce: Sums a tensor over processes.

    Returns:
        None if there are no tokens.
    """
    number = int(reduce(torch.tensor(len(tokens), device=tokens.device)))
    if number == 0:
        return None
    sizes = layer.own_experts
    dense = 2.0 * number * sizes.dense_dim * ((2 if sizes.is_gated else 1) * sizes.d_model + sizes.d_out)
    samples = _Samples(layer, tokens, slopes, number, ffn_flops / 2, reduce)
    config, tau = start, 1.0
    ((divergence, flops),) = samples.measured([(config, tau)])
    points = [Point(config, tau, divergence, flops)]
    while flops > ffn_flops * dense:
        lower: dict[str, Any] = {site: samples.next_share(site, getattr(config, site)) for site in free}
        settings = [(replace(config, **{site: to}), tau) for site, to in lower.items() if to >= LEAST_SHARE]
        fewer = [to for to in samples.taus if to < tau and to <= start.full_tau]
        # the first step is to pay for the router too, and may be a long one
        settings += [(config, to) for to in (fewer if tau == 1 else fewer[:2])]
        steps = [
            ((added - divergence) / (flops - left), setting, added, left)
            for setting, (added, left) in zip(settings, samples.measured(settings), strict=True)
            if left < flops
        ]
        if not steps:
            break
        _, (config, tau), divergence, flops = min(steps, key=lambda step: step[0])
        points.append(Point(config, tau, divergence, flops))
    return Way(points, dense)


class _Samples:
    """Some tokens of a layer, and what its settings do to them."""

    def __init__(
        self, layer: MoELayer, tokens: Tensor, slopes: Tensor, number: int, least: float, reduce: Reduce
    ) -> None:
        self.layer, self.tokens, self.reduce = layer, tokens, reduce
        self.sizes, self.gate = layer.own_experts, layer.get_gate()
        self.along = along_gradients(layer, tokens, slopes)  # (N, E, s)
        self.scores = layer.score(tokens)
        self.order = self.gate.order(self.scores)
        shares = reduce(shares_at(self.scores.float(), self.gate.config.rule).to(tokens.device) * len(tokens))
        run = dict(zip(FINE_TAUS, (shares / number).tolist(), strict=True))
        self.taus = [tau for tau in tau_grid([*run.values()], KEEP_EXPERTS) if run[tau] >= least]
        self.choices: dict[float, tuple[Tensor, int]] = {}  # by tau
        self.of_inputs: dict[float, tuple[Tensor, ...]] = {}  # by share
        self.of_configs: dict[CutoffConfig, tuple[Tensor, Tensor]] = {}
        hidden, gates = self._activations(tokens)
        self.dense = (hidden * self.along).flatten(1).sum(dim=1)  # (N,)
        self.seen = {site: self._seen(values) for site, values in zip(SITES, (tokens, hidden, gates), strict=True)}

    def next_share(self, site: str, share: float) -> float:
        """The next that leaves out more; where many values are the same, as with ReLU, that is some steps away."""
        before = self._cutoff(site, share)
        while share >= LEAST_SHARE and self._cutoff(site, share) == before:
            share *= KEEP
        return share

    def measured(self, settings: list[tuple[CutoffConfig, float]]) -> list[tuple[float, float]]:
        """Divergence and FLOPs of each setting, summed over tokens."""
        if not settings:
            return []
        sums = self.reduce(torch.stack([self._sums(config, tau) for config, tau in settings]))
        return [(divergence, flops) for divergence, flops in sums.tolist()]

    def _sums(self, config: CutoffConfig, tau: float) -> Tensor:
        worth, products = self._of_experts(config)  # (N, E) each
        beside = 0
        if tau < 1:
            mask, beside = self._choice(tau)  # (N, E)
            worth, products = worth * mask, products * mask
        divergence = 0.5 * (worth.sum(dim=1) - self.dense).double().square().sum()
        return torch.stack([divergence, 2 * products.sum(dtype=torch.float64) + beside])

    def _of_experts(self, config: CutoffConfig) -> tuple[Tensor, Tensor]:
        """What each gives along the gradient, and how many products that takes, ``(N, E)`` each."""
        if config not in self.of_configs:
            if len(self.of_configs) > len(SITES):  # those of the last step, and the one that was taken
                self.of_configs = {known: self.of_configs[known] for known in [*self.of_configs][-len(SITES) :]}
            read, worth, of_hidden, of_gates = self._given(config.inputs)
            sizes = self.sizes
            kept = of_hidden >= self._cutoff("hidden", config.hidden)  # (N, E, s)
            rows: Tensor | int = (2 if sizes.is_gated else 1) * sizes.expert_dim  # of weights that tokens meet
            if config.gate_proj < 1 and sizes.is_gated:
                passed = of_gates >= self._cutoff("gate_proj", config.gate_proj)
                kept &= passed
                rows = sizes.expert_dim + _summed(passed.float())  # (N, E)
            left = kept.float()
            products = rows * read.unsqueeze(1) + sizes.d_out * _summed(left)  # (N, E)
            self.of_configs[config] = _summed(left.mul_(worth)), products
        return self.of_configs[config]

    def _given(self, share: float) -> tuple[Tensor, ...]:
        """What is left of tokens at a share of their values: how many, and what activations then are."""
        if share not in self.of_inputs:
            if len(self.of_inputs) > 1:
                del self.of_inputs[max(self.of_inputs)]
            given = cut(self.tokens, self._cutoff("inputs", share))
            hidden, gates = self._activations(given)
            read = (self.tokens.abs() >= self._cutoff("inputs", share)).sum(dim=1).float()  # (N,)
            self.of_inputs[share] = (read, hidden * self.along, hidden.abs(), gates.abs())
        return self.of_inputs[share]

    def _activations(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Of all experts, and of their gates where there are some, ``(N, E, s)`` each."""
        hidden = self.layer.with_experts(lambda used, given: used.hidden(given), given)
        if not self.sizes.is_gated:
            return hidden, hidden
        gates = self.layer.with_experts(lambda used, given: used.gates(given), given)
        return hidden, gates.view_as(hidden)

    def _seen(self, values: Tensor) -> Magnitudes:
        seen = Magnitudes(values.device)
        seen.add(values)
        seen.counts = self.reduce(seen.counts)
        return seen

    def _cutoff(self, site: str, share: float) -> float:
        return self.seen[site].exceeded_by(share)

    def _choice(self, tau: float) -> tuple[Tensor, int]:
        """Which experts run, ``(N, E)``, and what it takes to choose them."""
        if tau not in self.choices:
            self.gate.set_tau(tau)
            mask = self.layer.choose(self.scores, self.gate, **self.order)
            self.choices[tau] = mask, self.layer.flops_beside_experts(len(mask), 1)
            self.gate.set_tau(1.0)
        return self.choices[tau]


def _summed(values: Tensor) -> Tensor:
    """Over the neurons of an expert, ``(N, E, s)`` to ``(N, E)``; as a product, which is faster for so few."""
    return (values.flatten(0, 1) @ values.new_ones(values.shape[2])).view(values.shape[:2])
