"""MoEfication's last phase: a choice of the same number of experts for every token. Everything else stays as it is."""

from typing import Any

from torch import Tensor

from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig, positive_sums, share_of_largest
from d2dmoe_pl.phases._router_training import RouterTraining


class ExpertSelection(RouterTraining):
    """Run the ``k`` experts of each layer that fire most for a token: MoEfication (arXiv 2110.01786), section 3.2.

    What chooses them is trained, if at all, on the frozen model with all experts on, to tell the sum of each expert's
    positive activations over the batch's largest.

    Args:
        k: Experts that each token runs, saved with the model. It can be changed at any time without training.
        router: Name of a router, e.g. of a file in ``moe/routers``: ``mlp``, a 2-layer MLP, the only one of
            MoEfication's that is trained; ``similarity`` of the token and the expert's weights; ``ground_truth``, an
            oracle that computes all activations first, and is charged for it; ``random``; or ``regression``, D2DMoE's.
        width: Hidden neurons of ``regression``.
        kwargs: As for :class:`d2dmoe_pl.phases._router_training.RouterTraining`.

    Raises:
        ConfigError: For an unknown router, or a ``k`` below 1 or above the number of experts.
    """

    def __init__(self, k: int, router: str = "mlp", width: int = 128, **kwargs: Any) -> None:
        super().__init__(RouterConfig(width, router), GateConfig("topk", k=k), **kwargs)

    def targets(self, name: str, hidden: Tensor) -> Tensor:
        return share_of_largest(positive_sums(hidden))
