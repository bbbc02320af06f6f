"""Phase 4: train routers to predict each expert's output norm. Everything else stays as it is."""

from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig, Target, gram_matrices, router_targets
from d2dmoe_pl.phases._router_training import RouterTraining
from d2dmoe_pl.sharded_tensors import whole


class RouterRegression(RouterTraining):
    """Train a router a MoE layer on the frozen model with all experts on: D2DMoE (arXiv 2310.04361), section 3.3.

    Args:
        width: Hidden neurons of a router.
        target: ``norm`` of each expert's output, as in the paper; ``relative_norm``, that over the mean of the token's,
            for language models, where norms differ by orders of magnitude; or ``activation_sum``, the sum of its
            activations over the batch's largest.
        rule: Gating rule saved with the model, e.g. the name of a file in ``moe/gating``; ``dynk_max`` if not given.
        tau: In [0, 1]; the setting saved with the model, 0.9 if not given. It can be changed at any time without
            training. An evaluation keeps what the model was saved with, unless one of these two is given.
        kwargs: As for :class:`d2dmoe_pl.phases._router_training.RouterTraining`.

    Raises:
        ConfigError: For a ``tau`` outside [0, 1], an unknown rule or target, or a width that is not positive.
    """

    def __init__(
        self,
        width: int = 128,
        target: Target = "norm",
        rule: str | None = None,
        tau: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(RouterConfig(width, target=target), _gate(rule, tau, GateConfig("dynk_max", 0.9)), **kwargs)
        self.rule = rule
        self.tau = tau

    @torch.no_grad()
    def transform_(self, model: nn.Module) -> None:
        super().transform_(model)
        if self.router_config.target == "relative_norm":  # of mean 1: what is learnt is how experts differ from that
            for layer in moe_layers(model).values():
                down: Any = layer.get_router().down
                down.weight.mul_(0.1)
                down.bias.fill_(1.0)

    def evaluation_gate(self, saved: GateConfig | None) -> GateConfig:
        return self.gate_config if saved is None else _gate(self.rule, self.tau, saved)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._grams = {name: gram_matrices(whole(layer.experts.down_weight)) for name, layer in self._layers.items()}

    def targets(self, name: str, hidden: Tensor) -> Tensor:
        return router_targets(self.router_config.target, hidden, self._grams[name])


def _gate(rule: str | None, tau: float | None, otherwise: GateConfig) -> GateConfig:
    """The gate of ``rule`` and ``tau``; what is not given is as in ``otherwise``."""
    if rule is None and tau is None:
        return otherwise
    return GateConfig(rule or otherwise.rule, otherwise.tau if tau is None else tau)
