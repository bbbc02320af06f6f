"""A phase of ours: a tau for every layer, for every budget. Trains nothing."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.budgets.allocation import (
    UNIFORM_TAUS,
    Measured,
    additive_path,
    filled,
    greedy_path,
    lower_envelope,
    tau_grid,
)
from d2dmoe_pl.moe.budgets.budget_path import (
    BudgetPath,
    budget_path,
    costs_in_steps,
    path_from_json,
    rounded_up,
    set_budget_,
    set_budget_path_,
)
from d2dmoe_pl.moe.budgets.kept_way import TRAINED, way_from_tensors
from d2dmoe_pl.moe.budgets.second_order import SecondOrder
from d2dmoe_pl.moe.budgets.setting_costs import setting_costs
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._beside_dense import BesideDense
from d2dmoe_pl.phases._calibration import Calibration
from d2dmoe_pl.phases._held_out import check_held_out, held_out, moved, summed
from d2dmoe_pl.phases._phase import Phase
from d2dmoe_pl.phases._scored_path import scored_path
from d2dmoe_pl.phases._work_shares import work_shares

PATH = "budget_path"  # key in checkpoints
PREDICTIONS_A_LAYER = 4  # at least


class BudgetCalibration(Calibration):
    """Find the ``tau`` of every layer for every budget: greedily, by divergence from the dense model per FLOP saved.

    From the dense end, the layer is lowered whose next step adds the least divergence of predictions per FLOP that it
    saves, on samples of the validation split; attention projections are layers of their own. Where one tau for all
    layers does better, that is taken, if it is measured. The whole way down is kept with the model, so that one
    artifact answers every budget, see :func:`d2dmoe_pl.set_budget_`.

    Args:
        ffn_flops: The budget that the model is saved with, share of the dense FFNs' FLOPs; the least that it can do, if
            that is more. An evaluation goes to it as well; with None it leaves the model as it was saved.
        num_samples: Of the validation split, that allocation goes by; drawn at random, but the same every time.
        num_scored_samples: Of the validation split, that costs and scores of the points on the way are measured on.
        num_scored_points: How many of them are measured, more of them where the score changes fast; those between are
            interpolated.
        keep: Share of a layer's executed experts that one step keeps; nearer to 1 is finer and takes longer.
        estimate: What a step adds to the divergence: ``measured``, by running the samples; or ``gradients``, by one
            gradient and what the step changes in the layer's own output. Measuring runs the model hundreds of times,
            and as much again for every further layer, and looks at one tau for all layers too; meanwhile the device
            holds ``tokens * d_model * (blocks + 1)`` values of ``num_samples``. Gradients are for deep models and for
            large vocabularies; what they find is not held against one tau for all layers, and all that they and scores
            need at once is a batch, and half a gigabyte at most. Or ``kept``: the way down is the one at whose settings
            ``BudgetDistillation`` has trained before, and costs and scores alone are measured. If not given: ``kept``
            where there is such a way, else ``measured``.
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.

    Raises:
        ConfigError: For shares outside (0, 1), numbers that are not positive, or, to fit, fewer samples than layers
            need, or no way down to be kept.
    """

    finds_budgets = True

    def __init__(
        self,
        ffn_flops: float | None = 0.25,
        num_samples: int = 512,
        num_scored_samples: int = 2000,
        num_scored_points: int = 20,
        keep: float = 0.75,
        estimate: Literal["measured", "gradients", "kept"] | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__(init_from)
        is_share = ffn_flops is None or 0 < ffn_flops <= 1
        check(is_share, f"ffn_flops={ffn_flops}: must lie in (0, 1], a share of the dense FFNs' FLOPs")
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
        self._num_layers = 0  # until there is a model
        self._path: BudgetPath | None = None
        self._trained: Mapping[str, Tensor] | None = None  # the way that is kept

    def check_start(self, stage: str, came_from: str, beside: Collection[str]) -> None:
        super().check_start(stage, came_from, beside)
        check(
            self.estimate != "kept" or TRAINED in beside,
            f"estimate='kept': init_from={self.init_from!r} is the work of {came_from}, and keeps no budgets; must be "
            "that of BudgetDistillation",
        )

    def configure_model(self) -> None:
        artifact = None if self.is_made else self.read_start(self.is_fitting)
        keeps_way = self.estimate in (None, "kept")
        if self.is_fitting and keeps_way and artifact is not None and TRAINED in artifact.tensors:
            self._trained = artifact.read_tensors(TRAINED)
        super().configure_model()

    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        check(self.ffn_flops is not None, "ffn_flops=None: is for evaluations; must be a share to be fitted")
        rules = {layer.get_gate().config.rule for layer in moe_layers(model).values()}
        check(len(rules) == 1, f"gates: have the rules {', '.join(sorted(rules))}; must be one for all layers")
        self._num_layers = len(moe_layers(model))

    def check_data(self, running: Phase) -> None:
        check_held_out(running, num_samples=self.num_samples, num_scored_samples=self.num_scored_samples)
        number = min(self.num_samples, running.data.num_validation_samples)
        is_kept = self.estimate == "kept" or self._trained is not None
        if not is_kept and number < PREDICTIONS_A_LAYER * self._num_layers:  # they may be of several tokens each
            self._check_enough(running, held_out(running, number))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[PATH] = None if self._path is None else self._path.as_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get(PATH) is not None:
            self._keep(path_from_json(checkpoint[PATH]))

    def on_fit_start(self) -> None:
        self.check_data(self)
        super().on_fit_start()

    def _check_enough(self, running: Phase, batches: Sequence[Batch]) -> int:
        """How many predictions there are in ``batches``, over all processes; raises ``ConfigError`` for too few."""
        own = torch.tensor(sum(map(running.task.weight, batches)), device=running.device)
        found = int(summed(running, own))
        check_enough(found, self._num_layers, f"num_samples={self.num_samples}")
        return found

    def calibrate_(self) -> None:
        rule = next(iter(moe_layers(self.model).values())).get_gate().config.rule
        path = self._found(rule) if self._trained is None else way_from_tensors(self._trained)
        self._keep(scored_path(self, path, rule, self.num_scored_samples, self.num_scored_points))

    def _found(self, rule: str) -> list[Measured]:
        """The way down from the dense model, with costs and divergences of the samples that it was found on."""
        layers = moe_layers(self.model)
        batches = held_out(self, self.num_samples)
        found = self._check_enough(self, batches)
        shares = work_shares(self, batches, rule)
        grids = [tau_grid(of_layer, self.keep) for of_layer in shares]
        if self.estimate == "gradients":
            path = self._estimated(batches, grids, found)
        else:
            samples = BesideDense(self, batches, keeps_vocabulary=False)
            greedy = greedy_path(grids, partial(self._measure, samples))
            uniform = [self._measure(samples, [tau] * len(layers)) for tau in UNIFORM_TAUS]
            # the dense end stays, whatever noise makes of its divergence
            path = [greedy[0], *lower_envelope([*greedy[1:], *uniform])]
        if costs_in_steps(rule):
            return path
        dense = [dense_ffn_flops(layer.sizes) for layer in layers.values()]
        return filled(path, [*map(setting_costs, layers.values(), shares, dense)])

    def prepare_evaluation_(self, model: nn.Module) -> None:
        """Go to the budget that is asked for; where that is not the one the model was saved with, it is said."""
        path = budget_path(model)
        if path is None or self.ffn_flops is None:
            return
        saved = [layer.gate and layer.gate.config for layer in moe_layers(model).values()]
        self._set_budget_(model, path)
        if saved != [layer.gate and layer.gate.config for layer in moe_layers(model).values()]:
            notice(f"Evaluated at ffn_flops={self.ffn_flops:g}, which is asked for, in the place of what was saved.")

    def _keep(self, path: BudgetPath) -> None:
        self._path = path
        set_budget_path_(self.model, path)
        self._set_budget_(self.model, path)

    def _set_budget_(self, model: nn.Module, path: BudgetPath) -> None:
        assert self.ffn_flops is not None
        least = path.points[-1].ffn_flops
        if self.ffn_flops < least:
            notice(
                f"ffn_flops={self.ffn_flops:g} cannot be reached: {rounded_up(least)} is the least here, and is taken."
            )
        set_budget_(model, ffn_flops=max(self.ffn_flops, least))

    def _estimated(self, batches: Sequence[Batch], grids: list[list[float]], predictions: int) -> list[Measured]:
        """The way down by gradients; divergences are sums over predictions."""
        layers = moe_layers(self.model)
        sums = SecondOrder(self.model, grids)
        for number, batch in enumerate(batches):
            on_device = moved(self, batch)
            sums.add(partial(self.run_layers, on_device), partial(self.curvature_loss, on_device, number))
        parts = (sums.divergences, sums.work, sums.beside, sums.tokens)
        divergences, work, beside, tokens = (summed(self, part.to(self.device)).tolist() for part in parts)
        dense = sum(n * dense_ffn_flops(layer.sizes) for n, layer in zip(tokens, layers.values(), strict=True))
        costs = [
            [(n * pair_flops(layer.sizes) + others) / dense for n, others in zip(*of_layer, strict=True)]
            for *of_layer, layer in zip(work, beside, layers.values(), strict=True)
        ]
        return additive_path(grids, [[each / predictions for each in steps] for steps in divergences], costs)

    def _measure(self, samples: BesideDense, taus: Sequence[float]) -> Measured:
        """Divergence and FFN FLOPs, share of the dense ones', with a tau for each layer."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for number in range(len(samples.batches)):
            sums += samples.run(number, taus)[1]
        divergence, flops, dense, weight = summed(self, sums).tolist()
        return Measured(tuple(taus), divergence / weight, flops / dense)


def check_enough(samples: int, num_layers: int, argument: str) -> None:
    """Raise ``ConfigError`` unless there are validation samples, or tokens, enough to tell what each layer needs."""
    needed = PREDICTIONS_A_LAYER * num_layers
    check(
        samples >= needed,
        f"{argument}: {samples} validation samples are too few; {num_layers} layers need at least {needed}",
    )
