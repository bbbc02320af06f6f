"""What phases share that give a model routers: the frozen model runs all its experts, and routers learn from that."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.convert import add_routers_, moe_layers, set_gate_
from d2dmoe_pl.moe.gate import GateConfig
from d2dmoe_pl.moe.layer import observed
from d2dmoe_pl.moe.router import RouterConfig
from d2dmoe_pl.phases.base import Batch, OptimizedPhase, freeze_


class RouterTraining(OptimizedPhase):
    """A phase that adds a router to every MoE layer and trains it, if there is anything in it to train.

    Args:
        router: Of every layer.
        gate: Saved with the model.
        kwargs: As for :class:`d2dmoe_pl.phases.base.OptimizedPhase`.
    """

    starts_from = "experts"
    ends_at = "routed"

    def __init__(self, router: RouterConfig, gate: GateConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.router_config = router
        self.gate_config = gate

    @abstractmethod
    def targets(self, name: str, hidden: Tensor) -> Tensor:
        """What the router of the layer ``name`` is to give where its experts' activations are ``hidden``.

        Args:
            name: Of the layer.
            hidden: ``(N, E, s)``.

        Returns:
            ``(N, E)``.
        """

    def transform_(self, model: nn.Module) -> None:
        add_routers_(model, self.router_config)
        freeze_(model, trained=[layer.router for layer in moe_layers(model).values()])

    def finish_(self, model: nn.Module) -> None:
        set_gate_(model, self.gate_config)

    def prepare_evaluation_(self, model: nn.Module) -> None:
        set_gate_(model, self.gate_config)

    def configure_optimizers(self) -> dict | None:
        return super().configure_optimizers() if self._is_trained() else None

    def on_fit_start(self) -> None:
        self._layers = moe_layers(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        return None if self._is_trained() else -1  # -1 ends the epoch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self._router_losses(batch)
        loss = torch.stack(list(losses.values())).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/router_loss/{name}": value.detach() for name, value in losses.items()})
        return loss

    def on_train_end(self) -> None:
        self.finish_(self.model)  # fitting ran all experts

    def _is_trained(self) -> bool:
        return any(layer.router.is_trained for layer in moe_layers(self.model).values())

    def _router_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of each router, by layer, from one pass of the frozen model."""
        losses: dict[str, Tensor] = {}

        def learn(name: str, tokens: Tensor, hidden: Tensor) -> None:
            target = self.targets(name, hidden)  # (N, E)
            with torch.enable_grad():
                losses[name] = self._layers[name].router.loss(tokens, target)

        with observed(self._layers, learn), torch.no_grad():
            self.logits(batch)
        return losses
