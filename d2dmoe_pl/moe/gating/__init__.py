"""Gating rules, one file each, whose ``RULE`` is a function ``rule(scores, tau) -> mask``.

Every rule takes router scores of shape ``(N, E)``, non-negative, and ``tau`` in [0, 1], a tensor without dimensions or
a number, and returns a boolean mask of shape ``(N, E)``: which experts run for which token. The contract, held by one
test over all rules:

- a larger ``tau`` never runs fewer experts, and ``tau = 1`` runs all of them (the dense layer);
- every token runs at least one expert;
- a token's row depends on that token's scores alone.

A rule that can run a given number of experts takes that as a third argument, ``k``.
"""

from d2dmoe_pl.moe.gating._gate import GATING_RULES, Gate, GateConfig, GatingRule, check_tau, register_gate, takes_k

__all__ = ["GATING_RULES", "Gate", "GateConfig", "GatingRule", "check_tau", "register_gate", "takes_k"]
