"""What a layer costs at each of its settings, before any of them is run."""

from collections.abc import Sequence
from itertools import accumulate

from d2dmoe_pl.moe.budgets.allocation import FINE_TAUS
from d2dmoe_pl.moe.layer import MoELayer


def setting_costs(layer: MoELayer, shares: Sequence[float], dense_flops: int) -> list[float]:
    """About what a layer costs at each of ``FINE_TAUS``, rising, as a share of the dense FFN's FLOPs.

    Just below the dense end a router costs more than the few experts that are skipped. A setting that costs more than
    one with more experts is given the cost of that one, so that none is looked for there.

    Args:
        layer: With a router and a gate, whose setting stays.
        shares: What its experts do at each of them, as a share of all they can.
        dense_flops: Those of the dense FFN, for one token.
    """
    gate = layer.get_gate()
    before = gate.config
    costs = []
    for tau, share in zip(FINE_TAUS, shares, strict=True):
        gate.set_tau(tau)
        costs.append(share + layer.flops_beside_experts(1, 1) / dense_flops)
    gate.set_config(before)
    return [*accumulate(reversed(costs), min)][::-1]
