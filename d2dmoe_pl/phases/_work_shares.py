"""About what a model's experts do at each setting, by the scores that its routers give."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS, shares_at
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases._held_out import moved, summed
from d2dmoe_pl.phases._phase import Phase


@torch.no_grad()
def work_shares(phase: Phase, batches: Sequence[Batch], rule: str) -> list[list[float]]:
    """The share of all work that a layer's experts do at each of ``FINE_TAUS``, by scores with every expert on.

    Args:
        phase: In its trainer; its model has gates, which are left at ``tau`` 1.
        batches: Of this process.
        rule: Gating rule of all layers.

    Returns:
        Of each layer, over all processes.
    """
    layers = moe_layers(phase.model)
    sums: dict[str, Tensor] = {}

    def see(name: str, gate: nn.Module, args: tuple[Tensor]) -> None:
        scores = layers[name].at_tokens(args[0])  # (N, E)
        shares = torch.cat([shares_at(scores.float(), rule).cpu(), torch.ones(1)]) * len(scores)
        sums[name] = sums.get(name, torch.zeros_like(shares)) + shares

    set_tau_(phase.model, 1.0)
    with hooked(layer.get_gate().register_forward_pre_hook(partial(see, name)) for name, layer in layers.items()):
        for batch in batches:
            phase.run_layers(moved(phase, batch))
    totals = {name: summed(phase, each.to(phase.device)).cpu() for name, each in sums.items()}
    return [layer.work_shares(FINE_TAUS, totals[name][:-1] / totals[name][-1]) for name, layer in layers.items()]
