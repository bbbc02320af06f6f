"""Phase 5, beyond the paper: let experts get used to being alone."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.data.epoch_order import folded
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.evaluation_mode import evaluating
from d2dmoe_pl.moe.conversion import temporary_gate
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig, check_tau
from d2dmoe_pl.moe.layer import observed
from d2dmoe_pl.moe.routers import gram_matrices, router_targets
from d2dmoe_pl.moe.sparsity_penalties import PENALTIES, Penalty
from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._held_out import check_held_out, held_out, moved, summed
from d2dmoe_pl.phases._hidden_states import check_hidden_states, hidden_state_error, logits_and_weighed_states
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase
from d2dmoe_pl.phases._phase import Phase
from d2dmoe_pl.phases._repeated_layers import mean_over_runs
from d2dmoe_pl.phases._teacher import Teacher, check_taught, described_teacher, read_teacher
from d2dmoe_pl.phases._weight_average import WeightAverage, between, put_best_, state_like, state_of

FULL_WEIGHT_SAMPLES = 100_000
DEFAULT_ALPHA = 1e-3
AVERAGE = "weight_average"  # key in checkpoints
LAST = "100% of the way to the end"  # among the weights that may go on


class RecoveryTuning(OptimizedPhase):
    """Fine-tune a routed model with its gate on, at another ``tau`` each step: one model for the whole curve.

    The mask of executed experts is a constant in the backward pass: only executed experts learn from the task. The loss
    is ``task_weight *`` the task's ``+ beta * distance to the predictions of the model before this phase with every
    expert on + hidden_weight * the same of hidden states + alpha * sparsity penalty + router_weight * mean over layers
    of the routers' loss``, so that routers follow the norms as the experts move. That last part reaches the routers
    alone. Stand-ins are trained along.

    What goes on are those weights whose loss is least, over the whole range of ``tau`` and on held-out samples: those
    before, those at the end, their mean over the last half, or what lies on the way to one of these. So the curve after
    is not below the curve before.

    Args:
        tau_min: Lower end of the range from which ``tau`` is drawn, uniformly.
        tau_max: Upper end.
        task_weight: Weight of the labels; if not given, a share of ``FULL_WEIGHT_SAMPLES`` that the training samples
            are, at most 1: few labels are soon learnt by heart, and the dense model has seen them already.
        beta: Weight of the distance of predictions to the teacher's; there is none if ``hidden_weight`` is 0 too.
        hidden_weight: Weight of the distance of hidden states to the teacher's, relative to their size.
        alpha: Weight of the penalty that keeps activations sparse; if not given, 1e-3 where all are ReLU, else 0.
        penalty: Its kind, as for ``SparsityEnforcement``.
        penalized: What it makes few of for a token: ``neurons`` that fire, as before clustering; or ``experts``, by the
            lengths of their activations, which is what is run or skipped.
        num_held_out: Validation samples that weights are chosen by; 0 to keep those of the end.
        router_weight: Weight of the routers' loss; with 0 they stay as they are.
        router_lr: Learning rate of the routers; the optimizer's own if not given. They are small and have to keep up
            with experts that move, so that a larger one than the model's can pay.
        teacher: Artifact folder of another model to learn from, run with every expert on; that of ``init_from`` if not
            given.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: For a range that is none or leaves [0, 1], negative weights, or a ``router_lr`` that is not
            positive or has no routers to train; to fit, if hidden states count that cannot be told, or are not the
            teacher's in number and width.
    """

    starts_from = "routed"
    ends_at = "routed"
    can_be_sharded = True

    def __init__(
        self,
        tau_min: float = 0.2,
        tau_max: float = 1.0,
        task_weight: float | None = None,
        beta: float = 1.0,
        hidden_weight: float = 0.0,
        alpha: float | None = None,
        penalty: Penalty = "hoyer",
        penalized: Literal["neurons", "experts"] = "neurons",
        num_held_out: int = 1000,
        router_weight: float = 1.0,
        router_lr: float | None = None,
        teacher: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_tau(tau_min, "tau_min")
        check_tau(tau_max, "tau_max")
        check(tau_min <= tau_max, f"tau_min={tau_min}: must be at most tau_max={tau_max}")
        weights = {"task_weight": task_weight, "beta": beta, "hidden_weight": hidden_weight, "alpha": alpha}
        for name, number in {**weights, "router_weight": router_weight, "num_held_out": num_held_out}.items():
            check(number is None or number >= 0, f"{name}={number}: must not be negative")
        check(router_lr is None or router_lr > 0, f"router_lr={router_lr}: must be positive")
        check(
            router_lr is None or router_weight > 0,
            f"router_lr={router_lr}: allowed only with a router_weight above 0; without, routers do not learn",
        )
        self.tau_min = tau_min
        self.tau_max = tau_max
        self.task_weight = task_weight
        self.beta = beta
        self.hidden_weight = hidden_weight
        self.alpha = alpha
        self.penalty = penalty
        self.penalized = penalized
        self.num_held_out = num_held_out
        self.router_weight = router_weight
        self.router_lr = router_lr
        self.teacher = teacher
        self._teacher: Teacher | None = None
        self._average = WeightAverage()

    def transform_(self, model: nn.Module) -> None:
        layers = moe_layers(model)
        check(bool(layers), f"{type(model).__name__}: has no MoE layer with a router; RecoveryTuning needs some")
        if self._is_taught() and self.teacher is not None:
            described_teacher(self.teacher, self.init_from, model)
        check_hidden_states(model, self.hidden_weight)
        for name, layer in layers.items():
            check(
                layer.gate is not None and layer.gate.config.k is None,
                f"gate of {name}: must be one that is set by tau, since RecoveryTuning draws it",
            )
            kind = layer.get_router().config.kind
            check(
                self.router_weight == 0 or kind == "regression",
                f"router_weight={self.router_weight}: must be 0 with routers of kind {kind!r} ({name}); only those of "
                "kind 'regression' can follow the norms",
            )
        for layer in layers.values():  # all else learns that its library does not keep as it is
            layer.get_router().requires_grad_(self.router_weight > 0)

    def learning_rate(self, name: str) -> float | None:
        return self.router_lr if ".router." in name else None

    def configure_model(self) -> None:
        if self.is_made:
            return
        super().configure_model()
        if self.is_fitting and self._is_taught():
            path = self.teacher or self.init_from
            assert path is not None  # only an artifact has routers
            self._teacher = read_teacher(self, path)
            check_hidden_states(self._teacher.model, self.hidden_weight)

    def check_data(self, running: Phase) -> None:
        if self.num_held_out > 0:
            check_held_out(running, num_held_out=self.num_held_out)
        if self._is_taught() and self.teacher is not None:
            check_taught(self.teacher, self.init_from, running.model)

    def _is_taught(self) -> bool:
        return self.beta + self.hidden_weight > 0

    def on_fit_start(self) -> None:
        self.check_data(self)
        self._layers = moe_layers(self.model)
        is_sparse = all(layer.experts.activation_kind == "relu" for layer in self._layers.values())
        self._alpha = (DEFAULT_ALPHA if is_sparse else 0.0) if self.alpha is None else self.alpha
        own = min(1.0, self.data.num_training_samples / FULL_WEIGHT_SAMPLES)
        self._task_weight = own if self.task_weight is None else self.task_weight
        if self._teacher is not None:
            self._teacher.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, penalties, router_losses, states = self._forward(batch, self._tau(batch_idx))
        parts = {"task_loss": self.task_loss(logits, batch)}
        loss = self._task_weight * parts["task_loss"]
        if penalties:
            parts["penalty"] = torch.stack(penalties).mean()
            loss = loss + self._alpha * parts["penalty"]
        if self._teacher is not None:
            with torch.no_grad():
                taught, taught_states = logits_and_weighed_states(self._teacher.model, batch, self.hidden_weight)
            if self.beta > 0:
                parts["prediction_loss"] = self.task.prediction_loss(logits, taught, batch)
                loss = loss + self.beta * parts["prediction_loss"]
            if self.hidden_weight > 0:
                parts["hidden_state_loss"] = hidden_state_error(states, taught_states, batch)
                loss = loss + self.hidden_weight * parts["hidden_state_loss"]
        if router_losses:
            parts["router_loss"] = torch.stack(list(router_losses.values())).mean()
            loss = loss + self.router_weight * parts["router_loss"]
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()})
        if router_losses:
            self.log_by_layer("router_loss", router_losses)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # of the step before; at a batch's end, callbacks have saved a checkpoint already
        if self.progress() >= 0.5:
            self._average.add(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[AVERAGE] = self._average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if AVERAGE in checkpoint:
            self._average.load_state_dict(checkpoint[AVERAGE])

    @torch.no_grad()
    def conclude(self) -> None:
        """Keep the weights whose loss is least over the whole range of ``tau``."""
        if self.num_held_out == 0:
            return
        assert self.init_from is not None
        before = state_like(self.model, load_model(self.init_from, mapped=True))
        ends = {"the end": state_of(self.model)}
        if self._average.steps > 0:
            ends["their mean"] = self._average.mean_like(self.model)
        states = {"those before": lambda: before} | {
            f"{part:.0%} of the way to {name}": partial(between, before, state, part)
            for name, state in ends.items()
            for part in (0.5, 0.75, 1.0)
        }
        with evaluating(self.model), self.trainer.precision_plugin.forward_context():
            best, found = put_best_(self.model, states, partial(self._losses, held_out(self, self.num_held_out)))
        self.goes_on_otherwise |= best != LAST
        notice(
            f"Of the weights, {best} go on: their loss on held-out samples is {found[best]:.3f} of what it was before, "
            f"over all tau; {found[LAST]:.3f} at the end."
        )

    def _losses(self, batches: Sequence[Batch]) -> list[float]:
        """The task's loss at settings over the whole range."""
        rule = next(iter(self._layers.values())).get_gate().config.rule
        losses = []
        for tau in (*torch.linspace(self.tau_min, self.tau_max, 4).tolist(), 1.0):
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            with temporary_gate(self.model, GateConfig(rule, min(tau, 1.0))):
                for batch in batches:
                    on_device, weight = moved(self, batch), self.task.weight(batch)
                    loss = self.task_loss(self.logits(on_device), on_device).double()
                    sums += torch.stack([weight * loss, torch.full_like(loss, weight)])
            total, weights = summed(self, sums).tolist()
            losses.append(total / weights)
        return losses

    def _tau(self, batch_idx: int) -> float:
        """What is drawn for a step, the same on all processes."""
        seed = folded(self.data.seed, "tau", self.current_epoch, batch_idx)
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        return self.tau_min + (self.tau_max - self.tau_min) * drawn

    def _forward(self, batch: Batch, tau: float) -> tuple[Tensor, list[Tensor], Mapping[str, Tensor], Sequence[Tensor]]:
        """Logits at ``tau``, the layers' penalties if any, the loss of each router that learns, and hidden states."""
        losses: defaultdict[str, list[Tensor]] = defaultdict(list)
        penalties: list[Tensor] = []

        def learn(name: str, tokens: Tensor, hidden: Tensor) -> None:
            layer = self._layers[name]
            if self._alpha > 0:
                each = hidden.flatten(1) if self.penalized == "neurons" else hidden.norm(dim=2)  # (N, E * s) or (N, E)
                penalties.append(PENALTIES[self.penalty](each).mean())
            if self.router_weight > 0:
                router = layer.get_router()
                with torch.no_grad():
                    gram = gram_matrices(layer.experts.down_weight)
                    target = router_targets(router.config.target, hidden, gram)  # (N, E)
                losses[name].append(router.loss(tokens.detach(), target))

        rule = next(iter(self._layers.values())).get_gate().config.rule
        with temporary_gate(self.model, GateConfig(rule, tau)), observed(self._layers, learn):
            logits, states = logits_and_weighed_states(self.model, batch, self.hidden_weight)
        return logits, penalties, mean_over_runs(losses), states
