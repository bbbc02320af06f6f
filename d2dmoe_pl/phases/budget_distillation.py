"""A phase of ours: routers and stand-ins, or the whole model, learn from the predictions that they are for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.data.epoch_order import folded
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, set_taus_
from d2dmoe_pl.moe.budgets.held_work import HeldWork
from d2dmoe_pl.moe.budgets.kept_way import TRAINED, way_tensors
from d2dmoe_pl.moe.conversion import temporary_gate
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.layer import learned_choices
from d2dmoe_pl.phases._held_out import held_out
from d2dmoe_pl.phases._hidden_states import check_hidden_states, hidden_state_error, logits_and_weighed_states
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase, freeze_
from d2dmoe_pl.phases._phase import Phase
from d2dmoe_pl.phases._teacher import Teacher, check_taught, described_teacher, read_teacher
from d2dmoe_pl.phases._work_shares import work_shares

HELD = "held_work"  # key in checkpoints
LOOKED_AT_EVERY = 20  # steps, in which scores change little


class BudgetDistillation(OptimizedPhase):
    """Train at budgets by the divergence of the predictions from those with every expert on, before this phase.

    Norms say how much of an output an expert is, not what it is worth to the prediction. Here each step draws a budget
    from those of the phase ``BudgetCalibration`` before, and routers get a gradient through the gate: what a chosen or
    skipped expert would change in the loss. Scores change by that, most often so that more experts have a part in
    them: each layer's ``tau`` goes with them, so that it does the work that it did at first. Another
    ``BudgetCalibration`` must follow, which keeps the settings that were trained, and measures their costs anew.

    Args:
        trains: ``routers``, and stand-ins: all other weights are frozen, so that the model with every expert on stays
            the same to the bit. Or ``model``: those too.
        task_weight: Weight of the task's loss, of labels, beside the divergence; 0 to use none.
        hidden_weight: Weight of how far hidden states are from those with every expert on, relative to their size.
        ffn_flops_min: Lower end of the range from which budgets are drawn, uniformly; shares of the dense FFNs' FLOPs.
            What the model cannot reach is cut off.
        ffn_flops_max: Upper end.
        softness: How far from the threshold of its gate a score learns, as a share of the threshold, or of the token's
            mean score where that is larger.
        router_lr: Learning rate of the routers; the optimizer's own if not given. Beside ``trains: model`` a tenth of
            that is better: experts cannot settle while others are chosen.
        teacher: Artifact folder of another model to learn from, run with every expert on; that of ``init_from`` if not
            given, which is no longer the dense one where all its weights have learnt at budgets already.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: For a range that is none or leaves (0, 1], a negative weight, or a ``softness`` or a ``router_lr``
            that is not positive; if hidden states count that cannot be told; to fit, unless it starts from the work of
            ``BudgetCalibration``, and for a ``teacher`` of other outputs.
    """

    starts_from = "routed"
    ends_at = "routed"
    leaves = (TRAINED,)

    def __init__(
        self,
        trains: Literal["routers", "model"] = "routers",
        task_weight: float = 0.0,
        hidden_weight: float = 0.0,
        ffn_flops_min: float = 0.2,
        ffn_flops_max: float = 0.9,
        softness: float = 0.1,
        router_lr: float | None = None,
        teacher: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check(
            0 < ffn_flops_min <= ffn_flops_max <= 1,
            f"ffn_flops_min={ffn_flops_min}: must be positive and at most ffn_flops_max={ffn_flops_max}, which is at "
            "most 1",
        )
        for name, weight in {"task_weight": task_weight, "hidden_weight": hidden_weight}.items():
            check(weight >= 0, f"{name}={weight}: must not be negative")
        check(softness > 0, f"softness={softness}: must be positive")
        check(router_lr is None or router_lr > 0, f"router_lr={router_lr}: must be positive")
        self.trains = trains
        self.task_weight = task_weight
        self.hidden_weight = hidden_weight
        self.ffn_flops_min = ffn_flops_min
        self.ffn_flops_max = ffn_flops_max
        self.softness = softness
        self.router_lr = router_lr
        self.teacher = teacher
        self._path: BudgetPath | None = None
        self._teacher: Teacher | None = None
        self._held: HeldWork | None = None  # once it trains
        self._looked_at = 0  # the step

    def check_start(self, stage: str, came_from: str, beside: Any) -> None:
        super().check_start(stage, came_from, beside)
        check(
            came_from == "BudgetCalibration",
            f"init_from={self.init_from!r}: is the work of {came_from}; BudgetDistillation draws budgets, and needs "
            "BudgetCalibration before it",
        )

    def transform_(self, model: nn.Module) -> None:
        layers = moe_layers(model).values()
        parts = [part for layer in layers for part in (layer.router, layer.stand_in) if part is not None]
        check(
            any(next(part.parameters(), None) is not None for part in parts),
            f"{type(model).__name__}: has no router or stand-in with weights; BudgetDistillation needs some",
        )
        check_hidden_states(model, self.hidden_weight)
        if self.teacher is not None:
            described_teacher(self.teacher, self.init_from, model)
        if self.trains == "routers":
            freeze_(model, trained=parts)

    def check_data(self, running: Phase) -> None:
        if self.teacher is not None:
            check_taught(self.teacher, self.init_from, running.model)

    def learning_rate(self, name: str) -> float | None:
        return self.router_lr if ".router." in name else None

    def configure_model(self) -> None:
        was_made = self.is_made
        super().configure_model()
        if self.is_fitting and not was_made:
            assert self.init_from is not None  # only an artifact has budgets
            self._path = read_artifact(self.init_from).budgets
            if self.trains == "model" or self.teacher is not None:
                self._teacher = read_teacher(self, self.teacher or self.init_from)
                check_hidden_states(self._teacher.model, self.hidden_weight)

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._held is None:  # not resumed
            found = self._work_shares()
            self._held = HeldWork(found, found)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step >= self._looked_at + LOOKED_AT_EVERY:
            self._look()

    def conclude(self) -> None:
        super().conclude()
        if self._held is not None:  # it has been trained
            self._look()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[HELD] = None if self._held is None else (self._held.first, self._held.now, self._looked_at)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get(HELD) is not None:
            first, now, self._looked_at = checkpoint[HELD]
            self._held = HeldWork(first, now)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self._path is not None
        dense, dense_states = self._dense(batch)
        self._set_budget_(self._path, self._budget(batch_idx))
        with learned_choices(moe_layers(self.model), self.softness):
            logits, states = logits_and_weighed_states(self.model, batch, self.hidden_weight)
        loss = self.task.prediction_loss(logits, dense, batch)
        self.log("train/divergence", loss.detach())
        if self.task_weight > 0:
            loss = loss + self.task_weight * self.task_loss(logits, batch)
        if self.hidden_weight > 0:
            hidden_state_loss = hidden_state_error(states, dense_states, batch)
            self.log("train/hidden_state_loss", hidden_state_loss.detach())
            loss = loss + self.hidden_weight * hidden_state_loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _dense(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits and hidden states with every expert on, before this phase."""
        if self._teacher is not None:
            return logits_and_weighed_states(self._teacher.model, batch, self.hidden_weight)
        with temporary_gate(self.model, None):  # whose weights stay
            return logits_and_weighed_states(self.model, batch, self.hidden_weight)

    def on_validation_epoch_start(self) -> None:
        if self._path is not None:
            self._set_budget_(self._path, (self.ffn_flops_min + self.ffn_flops_max) / 2)

    def finish_(self, model: nn.Module) -> None:
        if self._path is not None:
            self.on_validation_epoch_start()

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        assert self._path is not None
        points = tuple(replace(point, taus=self._moved(point.taus)) for point in self._path.points)
        return {TRAINED: way_tensors(replace(self._path, points=points))}

    def _look(self) -> None:
        assert self._held is not None
        self._held.now = self._work_shares()
        self._looked_at = self.global_step

    def _work_shares(self) -> list[list[float]]:
        """What layers do on a batch of validation samples, the same each time."""
        assert self._path is not None
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        batches = held_out(self, self.data.batch_size * self.trainer.world_size)
        with self.trainer.precision_plugin.forward_context():
            found = work_shares(self, batches, self._path.rule)
        for module, is_training in modes.items():
            module.training = is_training
        return found

    def _moved(self, taus: Sequence[float]) -> tuple[float, ...]:
        return tuple(taus) if self._held is None else self._held.taus(taus)

    def _set_budget_(self, path: BudgetPath, ffn_flops: float) -> None:
        """Set the gates to a budget, or to the least that the model can do, if that is more."""
        point = path.at_cost("ffn_flops", max(ffn_flops, path.points[-1].ffn_flops))
        set_taus_(self.model, path, self._moved(point.taus))

    def _budget(self, batch_idx: int) -> float:
        """What is drawn for a step, the same on all processes."""
        seed = folded(self.data.seed, "budget", self.current_epoch, batch_idx)
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        return self.ffn_flops_min + (self.ffn_flops_max - self.ffn_flops_min) * drawn
