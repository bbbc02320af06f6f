"""A phase of ours: a tau for every layer, for every budget. Trains nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.flops import (
    SampleSize,
    dense_ffn_flops,
    flops_outside_ffns,
    pair_flops,
    sample_inputs,
    sample_sizes,
)
from d2dmoe_pl.moe.budgets.allocation import (
    UNIFORM_TAUS,
    Measured,
    additive_path,
    greedy_path,
    interpolated,
    lower_envelope,
    shares_at,
    tau_grid,
)
from d2dmoe_pl.moe.budgets.block_replay import BlockReplay
from d2dmoe_pl.moe.budgets.budget_path import (
    BudgetPath,
    BudgetPoint,
    falling,
    path_from_json,
    set_budget_,
    set_budget_path_,
)
from d2dmoe_pl.moe.budgets.second_order import SecondOrder
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._calibration import Calibration
from d2dmoe_pl.phases._held_out import check_held_out, held_out, moved, summed

PATH = "budget_path"  # key in checkpoints
PREDICTIONS_A_LAYER = 4  # at least


@dataclass(frozen=True)
class _Calls:
    """Batches of validation samples, and what the model says of them with every expert on."""

    batches: Sequence[Batch]
    dense: Sequence[Tensor]
    replay: BlockReplay
    # by batch and layer, the pairs that ran when it ran last, and tokens
    counts: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)


class BudgetCalibration(Calibration):
    """Find the ``tau`` of every layer for every budget: greedily, by divergence from the dense model per FLOP saved.

    From the dense end, the layer is lowered whose next step adds the least divergence of predictions per FLOP that it
    saves, on samples of the validation split; attention projections are layers of their own. Where one tau for all
    layers does better, that is taken. The whole way down is kept with the model, so that one artifact answers every
    budget, see :func:`d2dmoe_pl.set_budget_`.

    Args:
        ffn_flops: The budget that the model is saved with, share of the dense FFNs' FLOPs; the least that it can do, if
            that is more.
        num_samples: Of the validation split, that allocation goes by; drawn at random, but the same every time.
        num_scored_samples: Of the validation split, that costs and scores of the points on the way are measured on.
        num_scored_points: How many of them are measured; those between are interpolated.
        keep: Share of a layer's executed experts that one step keeps; nearer to 1 is finer and takes longer.
        estimate: What a step adds to the divergence: ``measured``, by running the samples; or ``gradients``, by one
            gradient and what the step changes in the layer's own output. Measuring runs the model hundreds of times,
            and as much again for every further layer; gradients are for deep models and for large vocabularies.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.

    Raises:
        ConfigError: For shares outside (0, 1), numbers that are not positive, or, to fit, fewer samples than layers
            need.
    """

    def __init__(
        self,
        ffn_flops: float = 0.25,
        num_samples: int = 512,
        num_scored_samples: int = 2000,
        num_scored_points: int = 20,
        keep: float = 0.75,
        estimate: Literal["measured", "gradients"] = "measured",
        init_from: str | None = None,
    ) -> None:
        super().__init__(init_from)
        check(ffn_flops > 0, f"ffn_flops={ffn_flops}: must be positive, a share of the dense FFNs' FLOPs")
        check(0 < keep < 1, f"keep={keep}: must lie in (0, 1), the share of executed experts that a step keeps")
        check(num_samples > 0, f"num_samples={num_samples}: must be positive")
        check(num_scored_samples > 0, f"num_scored_samples={num_scored_samples}: must be positive")
        check(num_scored_points > 1, f"num_scored_points={num_scored_points}: must be more than 1")
        self.ffn_flops = ffn_flops
        self.num_samples = num_samples
        self.num_scored_samples = num_scored_samples
        self.num_scored_points = num_scored_points
        self.keep = keep
        self.estimate = estimate
        self._path: BudgetPath | None = None
        self._flops_outside: dict[SampleSize, int] = {}

    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        gates = {name: layer.get_gate().config for name, layer in moe_layers(model).items()}
        rules = {gate.rule for gate in gates.values()}
        check(len(rules) == 1, f"gates: have the rules {', '.join(sorted(rules))}; must be one for all layers")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[PATH] = None if self._path is None else self._path.as_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get(PATH) is not None:
            self._keep(path_from_json(checkpoint[PATH]))

    def on_fit_start(self) -> None:
        check_held_out(self, num_samples=self.num_samples, num_scored_samples=self.num_scored_samples)
        super().on_fit_start()

    def calibrate_(self) -> None:
        layers = moe_layers(self.model)
        batches = held_out(self, self.num_samples)
        found = int(summed(self, torch.tensor(sum(map(self.task.weight, batches)), device=self.device)))
        check_enough(found, len(layers), f"num_samples={self.num_samples}")
        rule = next(iter(layers.values())).get_gate().config.rule
        grids = self._grids(batches, rule)
        if self.estimate == "gradients":
            self._keep(self._scored(self._estimated(batches, grids, found), rule))
            return
        samples = self._calls(batches)
        path = greedy_path(grids, partial(self._measure, samples))
        uniform = [self._measure(samples, [tau] * len(layers)) for tau in UNIFORM_TAUS]
        # the dense end stays, whatever noise makes of its divergence
        self._keep(self._scored([path[0], *lower_envelope([*path[1:], *uniform])], rule))

    def _keep(self, path: BudgetPath) -> None:
        self._path = path
        set_budget_path_(self.model, path)
        least = path.points[-1].ffn_flops
        if self.ffn_flops < least:
            notice(
                f"ffn_flops={self.ffn_flops:g} cannot be reached: {least:.4f} is the least of this model, and saved."
            )
        set_budget_(self.model, ffn_flops=max(self.ffn_flops, least))

    def _calls(self, batches: Sequence[Batch]) -> _Calls:
        """Batches, and what is said of them."""
        set_tau_(self.model, 1.0)
        replay = BlockReplay(self.model, list(moe_layers(self.model)))
        return _Calls(batches, [self.logits(moved(self, batch)) for batch in batches], replay)

    def _grids(self, batches: Sequence[Batch], rule: str) -> list[list[float]]:
        """Settings of each layer, by the scores that its router gives with every expert on."""
        layers = moe_layers(self.model)
        sums: dict[str, Tensor] = {}

        def see(name: str, gate: nn.Module, args: tuple[Tensor]) -> None:
            shares = torch.cat([shares_at(args[0].float(), rule).cpu(), torch.ones(1)]) * len(args[0])
            sums[name] = sums.get(name, torch.zeros_like(shares)) + shares

        handles = (layer.get_gate().register_forward_pre_hook(partial(see, name)) for name, layer in layers.items())
        set_tau_(self.model, 1.0)
        with hooked(handles):
            for batch in batches:
                self.logits(moved(self, batch))
        totals = {name: summed(self, each.to(self.device)) for name, each in sums.items()}
        return [tau_grid((totals[name][:-1] / totals[name][-1]).tolist(), self.keep) for name in layers]

    def _estimated(self, batches: Sequence[Batch], grids: list[list[float]], predictions: int) -> list[Measured]:
        """The way down by gradients; divergences are sums over predictions."""
        layers = moe_layers(self.model)
        sums = SecondOrder(layers, grids)
        for batch in batches:
            on_device, weight = moved(self, batch), self.task.weight(batch)
            sums.add(
                partial(self.logits, on_device),
                partial(lambda given, times: times * self.task_loss(self.logits(given), given), on_device, weight),
            )
        parts = (sums.divergences, sums.pairs, sums.tokens)
        divergences, pairs, tokens = (summed(self, part.to(self.device)).tolist() for part in parts)
        dense = sum(n * dense_ffn_flops(layer.sizes) for n, layer in zip(tokens, layers.values(), strict=True))
        costs = [
            [(n * pair_flops(layer.sizes) + layer.flops_beside_experts(seen, 1)) / dense for n in steps]
            for steps, seen, layer in zip(pairs, tokens, layers.values(), strict=True)
        ]
        return additive_path(grids, [[each / predictions for each in steps] for steps in divergences], costs)

    def _measure(self, calls: _Calls, taus: Sequence[float]) -> Measured:
        """Divergence and FFN FLOPs, share of the dense ones', with a tau for each layer."""
        divergence, flops, dense, _, _ = self._run(calls, taus).tolist()
        return Measured(tuple(taus), divergence, flops / dense)

    def _run(self, calls: _Calls, taus: Sequence[float], metrics: Any = None) -> Tensor:
        """Sums over samples and processes: mean divergence, FFN FLOPs, those of dense, FLOPs outside, samples."""
        layers = list(moe_layers(self.model).values())
        for layer, tau in zip(layers, taus, strict=True):
            layer.get_gate().set_tau(tau)
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        counts: dict[int, tuple[int, int]] = {}

        def count(index: int, mask: Tensor) -> None:
            counts[index] = int(mask.sum()), len(mask)

        with hooked(layer.watch(partial(count, index)) for index, layer in enumerate(layers)):
            for number, (batch, dense) in enumerate(zip(calls.batches, calls.dense, strict=True)):
                on_device, weight = moved(self, batch), self.task.weight(batch)
                counts = {} if number not in calls.counts else dict(calls.counts[number])
                with calls.replay.running(number, taus):
                    logits = self.logits(on_device)
                calls.counts[number] = dict(counts)
                sums[0] += weight * self.task.prediction_loss(logits, dense, on_device)
                sums[1:3] += _ffn_flops(layers, counts).to(sums)
                sums[3] += weight
                if metrics is not None:
                    sums[4] += self._outside(on_device)
                    metrics.update(logits, self.with_written(on_device))
        sums = summed(self, sums)
        return torch.stack([sums[0] / sums[3], sums[1], sums[2], sums[4], sums[3]])

    def _outside(self, batch: Batch) -> int:
        """FLOPs outside the FFNs of all samples of a batch."""
        sizes = sample_sizes(batch)
        for size in set(sizes) - self._flops_outside.keys():
            self._flops_outside[size] = flops_outside_ffns(self.model, sample_inputs(batch, size))
        return sum(self._flops_outside[size] for size in sizes)

    def _scored(self, path: Sequence[Measured], rule: str) -> BudgetPath:
        """The path with costs and scores of more samples: measured at some points, those between interpolated."""
        calls = self._calls(held_out(self, self.num_scored_samples))
        steps = torch.linspace(0, len(path) - 1, min(self.num_scored_points, len(path))).round().int().tolist()
        measured: dict[int, BudgetPoint] = {}
        samples, outside = 0, 0.0  # the share of the dense model's FLOPs that are not the FFNs'
        for step in dict.fromkeys(steps):
            metrics = self.task.metrics().to(self.device)
            divergence, flops, dense, beside, count = self._run(calls, path[step].taus, metrics).tolist()
            score = float(metrics.compute()[self.task.main_metric])
            samples, outside = int(count), beside / (beside + dense)
            measured[step] = BudgetPoint(
                path[step].taus,
                flops / dense,
                outside + (1 - outside) * flops / dense,
                divergence,
                100 * score if self.task.in_percent else score,
            )
        # costs on few samples are off by a factor that hardly changes from one point to the next
        factors = {step: point.ffn_flops / path[step].cost for step, point in measured.items()}
        divergences = {step: point.divergence for step, point in measured.items()}
        scores = {step: point.score for step, point in measured.items()}
        points = []
        for step, each in enumerate(path):
            cost = each.cost * interpolated(factors, step)
            whole = outside + (1 - outside) * cost
            at_step = (interpolated(divergences, step), interpolated(scores, step))
            points.append(BudgetPoint(each.taus, cost, whole, *at_step))
        task = self.task
        return BudgetPath(
            tuple(moe_layers(self.model)),
            rule,
            task.main_metric,
            task.in_percent,
            task.higher_is_better,
            samples,
            falling(points),
        )


def check_enough(samples: int, num_layers: int, argument: str) -> None:
    """Raise ``ConfigError`` unless there are validation samples, or tokens, enough to tell what each layer needs."""
    needed = PREDICTIONS_A_LAYER * num_layers
    check(
        samples >= needed,
        f"{argument}: {samples} validation samples are too few; {num_layers} layers need at least {needed}",
    )


def _ffn_flops(layers: Sequence[MoELayer], counts: Mapping[int, tuple[int, int]]) -> Tensor:
    """FLOPs of the layers, by the pairs that ran and tokens of each, and those of the dense FFNs: ``(2,)``."""
    ran = dense = 0
    for index, layer in enumerate(layers):
        pairs, tokens = counts[index]
        ran += pairs * pair_flops(layer.sizes) + layer.flops_beside_experts(tokens, 1)
        dense += tokens * dense_ffn_flops(layer.sizes)
    return torch.tensor([ran, dense], dtype=torch.float64)
