"""What an FFN computes before its second product, of all its neurons or of one expert's, and what it adds that to."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def hidden_activations(
    activation: Callable[[Tensor], Tensor],
    tokens: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
) -> Tensor:
    """``act(up(x))``, or ``act(gate(x)) * up(x)`` if there is a gate.

    Args:
        activation: The elementwise function.
        tokens: ``(N, d_model)``.
        up_weight: ``(n, d_model)``; so is ``gate_weight``.
        up_bias: ``(n,)``; so is ``gate_bias``.
        gate_weight: Of a gated FFN.
        gate_bias: Of a gated FFN.

    Returns:
        ``(N, n)``.
    """
    up = F.linear(tokens, up_weight, up_bias)
    return activation(up) if gate_weight is None else activation(F.linear(tokens, gate_weight, gate_bias)) * up


def output_of_no_expert(tokens: Tensor, down_bias: Tensor | None, d_out: int) -> Tensor:
    """The output bias, or zeros, one row a token, in memory of its own to add to: ``(N, d_out)``."""
    if down_bias is None:
        return tokens.new_zeros(tokens.shape[0], d_out)
    return down_bias.repeat(tokens.shape[0], 1)
