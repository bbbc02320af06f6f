"""Ways to split neurons into experts, one file each: ``split(weight, statistic, num_experts, seed) -> assignment``.

``weight`` is ``(d_ff, d_model)``, what decides whether a neuron fires; the assignment is ``(d_ff,)`` integers in
``[0, E)``, every expert ``d_ff / E`` times. The function's attribute ``statistic`` names what is gathered for it on
real data, a function of :mod:`d2dmoe_pl.moe.firing`, or is None; the argument ``statistic`` is the sum of that.
"""
