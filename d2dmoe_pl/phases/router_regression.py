"""Phase 4: train routers to predict each expert's output norm. Everything else stays as it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.moe.convert import add_routers_, moe_layers, set_gate_
from d2dmoe_pl.moe.gate import GateConfig
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.router import RouterConfig
from d2dmoe_pl.moe.router_targets import Target, activation_sums, gram_matrices, output_norms
from d2dmoe_pl.phases.base import Batch, OptimizedPhase, freeze_


class RouterRegression(OptimizedPhase):
    """Train a router a MoE layer on the frozen model with all experts on: D2DMoE (arXiv 2310.04361), section 3.3.

    Args:
        width: Hidden neurons of a router.
        target: ``norm`` of each expert's output, as in the paper; or ``activation_sum``, the sum of its activations
            over the batch's largest.
        gate: Gating rule saved with the model, the name of a file in ``moe/gating``.
        tau: In [0, 1]; the setting saved with the model. It can be changed at any time without training.
        kwargs: As for :class:`d2dmoe_pl.phases.base.OptimizedPhase`.

    Raises:
        ConfigError: For a ``tau`` outside [0, 1], an unknown rule, or a width that is not positive.
    """

    starts_from = "experts"
    ends_at = "routed"

    def __init__(
        self,
        width: int = 128,
        target: Target = "norm",
        gate: str = "dynk_max",
        tau: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = RouterConfig(width)
        self.target = target
        self.gate_config = GateConfig(gate, tau)

    def transform_(self, model: nn.Module) -> None:
        add_routers_(model, self.config)
        freeze_(model, trained=[layer.router for layer in moe_layers(model).values()])

    def finish_(self, model: nn.Module) -> None:
        set_gate_(model, self.gate_config)

    def prepare_evaluation_(self, model: nn.Module) -> None:
        set_gate_(model, self.gate_config)

    def on_fit_start(self) -> None:
        self._layers = moe_layers(self.model)
        self._grams = {
            name: gram_matrices(layer.experts.down_weight) if self.target == "norm" else None
            for name, layer in self._layers.items()
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self._router_losses(batch)
        loss = torch.stack(list(losses.values())).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/router_loss/{name}": value.detach() for name, value in losses.items()})
        return loss

    def on_train_end(self) -> None:
        self.finish_(self.model)  # fitting ran all experts

    def _router_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of each router, by layer, from one pass of the frozen model."""
        losses: dict[str, Tensor] = {}

        def observe(name: str, layer: MoELayer) -> None:
            def observer(tokens: Tensor, hidden: Tensor) -> None:
                gram = self._grams[name]
                target = activation_sums(hidden) if gram is None else output_norms(hidden, gram)  # (N, E)
                with torch.enable_grad():
                    losses[name] = F.mse_loss(layer.router(tokens), target)

            layer.observer = observer

        for name, layer in self._layers.items():
            observe(name, layer)
        try:
            with torch.no_grad():
                self.logits(batch)
        finally:
            for layer in self._layers.values():
                layer.observer = None
        return losses
