"""What an FFN computes before its second product, of all its neurons or of one expert's, and what it adds that to."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from d2dmoe_pl.moe.cutoffs.cutoffs import cut


def hidden_activations(
    activation: Callable[[Tensor], Tensor],
    tokens: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gate_cutoff: Tensor | None = None,
) -> Tensor:
    """``act(up(x))``, or ``act(gate(x)) * up(x)`` if there is a gate.

    Args:
        activation: The elementwise function.
        tokens: ``(N, d_model)``.
        up_weight: ``(n, d_model)``; so is ``gate_weight``.
        up_bias: ``(n,)``; so is ``gate_bias``.
        gate_weight: Of a gated FFN.
        gate_bias: Of a gated FFN.
        gate_cutoff: Magnitude below which what the activation gives for a gate is taken as 0; None for nothing.

    Returns:
        ``(N, n)``.
    """
    up = F.linear(tokens, up_weight, up_bias)
    if gate_weight is None:
        return activation(up)
    gates = activation(F.linear(tokens, gate_weight, gate_bias))
    return (gates if gate_cutoff is None else cut(gates, gate_cutoff)) * up


def output_of_no_expert(tokens: Tensor, down_bias: Tensor | None, d_out: int) -> Tensor:
    """The output bias, or zeros, one row a token, in memory of its own to add to: ``(N, d_out)``."""
    if down_bias is None:
        return tokens.new_zeros(tokens.shape[0], d_out)
    return down_bias.repeat(tokens.shape[0], 1)
