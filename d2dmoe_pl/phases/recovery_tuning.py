"""Phase 5, beyond the paper: let experts get used to being alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.data.epoch_order import folded
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.conversion import set_gate_, temporary_gate
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig, check_tau
from d2dmoe_pl.moe.layer import observed
from d2dmoe_pl.moe.routers import gram_matrices, output_norms
from d2dmoe_pl.phases._labels import check_same_outputs
from d2dmoe_pl.phases._optimized_phase import OptimizedPhase
from d2dmoe_pl.phases._teacher import Teacher


class RecoveryTuning(OptimizedPhase):
    """Fine-tune a routed model with its gate on, at another ``tau`` each step: one model for the whole curve.

    The mask of executed experts is a constant in the backward pass: only executed experts learn from the task. The loss
    is the task's ``+ beta * distance to the predictions of the model before this phase with every expert on +
    router_weight * mean over layers of the routers' loss``, so that routers follow the norms as the experts move. That
    last part reaches the routers alone.

    Args:
        tau_min: Lower end of the range from which ``tau`` is drawn, uniformly.
        tau_max: Upper end.
        beta: Weight of the distillation; with 0 there is no teacher.
        router_weight: Weight of the routers' loss; with 0 they stay as they are.
        router_lr: Learning rate of the routers; the optimizer's own if not given. They are small and have to keep up
            with experts that move, so that a larger one than the model's can pay.
        teacher: Artifact folder of another model to learn from, run with every expert on; that of ``init_from`` if not
            given.
        kwargs: As for :class:`d2dmoe_pl.phases.OptimizedPhase`.

    Raises:
        ConfigError: For a range that is none or leaves [0, 1], negative weights, or a ``router_lr`` that is not
            positive or has no routers to train.
    """

    starts_from = "routed"
    ends_at = "routed"

    def __init__(
        self,
        tau_min: float = 0.3,
        tau_max: float = 0.9,
        beta: float = 1.0,
        router_weight: float = 1.0,
        router_lr: float | None = None,
        teacher: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_tau(tau_min, "tau_min")
        check_tau(tau_max, "tau_max")
        check(tau_min <= tau_max, f"tau_min={tau_min}: must be at most tau_max={tau_max}")
        check(beta >= 0, f"beta={beta}: must not be negative")
        check(router_weight >= 0, f"router_weight={router_weight}: must not be negative")
        check(router_lr is None or router_lr > 0, f"router_lr={router_lr}: must be positive")
        check(
            router_lr is None or router_weight > 0,
            f"router_lr={router_lr}: allowed only with a router_weight above 0; without, routers do not learn",
        )
        self.tau_min = tau_min
        self.tau_max = tau_max
        self.beta = beta
        self.router_weight = router_weight
        self.router_lr = router_lr
        self.teacher = teacher
        self._teacher: Teacher | None = None

    def transform_(self, model: nn.Module) -> None:
        layers = moe_layers(model)
        check(bool(layers), f"{type(model).__name__}: has no MoE layer with a router; RecoveryTuning needs some")
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
        model.requires_grad_(True)
        for layer in layers.values():
            layer.get_router().requires_grad_(self.router_weight > 0)

    def learning_rate(self, name: str) -> float | None:
        return self.router_lr if ".router." in name else None

    def configure_model(self) -> None:
        if self.is_made:
            return
        super().configure_model()
        if self.is_fitting and self.beta > 0:
            path = self.teacher or self.init_from
            assert path is not None  # only an artifact has routers
            teacher = load_model(path)
            check_same_outputs(teacher, self.model, f"teacher={str(path)!r}")
            if moe_layers(teacher):
                set_gate_(teacher, None)
            self._teacher = Teacher(teacher)

    def on_fit_start(self) -> None:
        self._layers = moe_layers(self.model)
        if self._teacher is not None:
            self._teacher.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, router_losses = self._forward(batch, self._tau(batch_idx))
        loss = task_loss = self.task_loss(logits, batch)
        parts = {"task_loss": task_loss}
        if self._teacher is not None:
            parts["prediction_loss"] = self.task.prediction_loss(logits, self._teacher.logits(batch), batch)
            loss = loss + self.beta * parts["prediction_loss"]
        if router_losses:
            parts["router_loss"] = torch.stack(list(router_losses.values())).mean()
            loss = loss + self.router_weight * parts["router_loss"]
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()})
        self.log_dict({f"train/router_loss/{name}": value.detach() for name, value in router_losses.items()})
        return loss

    def _tau(self, batch_idx: int) -> float:
        """What is drawn for a step, the same on all processes."""
        seed = folded(self.data.seed, "tau", self.current_epoch, batch_idx)
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        return self.tau_min + (self.tau_max - self.tau_min) * drawn

    def _forward(self, batch: Batch, tau: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The logits at ``tau``, and the loss of each layer's router if routers learn."""
        losses: dict[str, Tensor] = {}

        def learn(name: str, tokens: Tensor, hidden: Tensor) -> None:
            layer = self._layers[name]
            if self.router_weight > 0:
                with torch.no_grad():
                    target = output_norms(hidden, gram_matrices(layer.experts.down_weight))  # (N, E)
                losses[name] = layer.get_router().loss(tokens.detach(), target)

        rule = next(iter(self._layers.values())).get_gate().config.rule
        with temporary_gate(self.model, GateConfig(rule, tau)), observed(self._layers, learn):
            return self.logits(batch), losses
