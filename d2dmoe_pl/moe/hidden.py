"""What stands between the two products of an FFN, of all its neurons or of one expert's."""

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
