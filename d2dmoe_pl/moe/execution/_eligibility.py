"""What stands in the way of compiled kernels, which compute no gradients and know some functions and types only."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.moe.experts.activation_kinds import KNOWN
from d2dmoe_pl.moe.experts.experts import Experts


def needs_gradients(experts: Experts, tokens: Tensor) -> bool:
    """Whether autograd would want to go back through the experts."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (tokens, *experts.weights)
    )


def has_active_dropout(experts: Experts) -> bool:
    """Whether activations are dropped in this call."""
    dropout: Any = experts._modules["hidden_dropout"]
    return dropout.training and getattr(dropout, "p", 0.0) > 0


def run_type(experts: Experts, tokens: Tensor) -> torch.dtype:
    """The type of what products give: autocast's where it is on, else the weights'; the tokens' for packed weights."""
    device = tokens.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tokens.dtype if experts.is_quantized else experts.up_weight.dtype


def obstacle(experts: Experts, tokens: Tensor, types: Collection[torch.dtype]) -> str | None:
    """Why a compiled kernel that takes ``types`` cannot run this call, in words; None if it can."""
    if needs_gradients(experts, tokens):
        return "has no gradients; run under torch.no_grad(), or train with 'auto', 'reference' or 'grouped'"
    if has_active_dropout(experts):
        return f"has no dropout, and p={experts.hidden_dropout.p} is active; call model.eval() first"
    if experts.activation_kind is None:
        return f"the activation {type(experts.activation).__name__} is not one of {', '.join(KNOWN)}"
    dtype = run_type(experts, tokens)
    if dtype not in types or (tokens.dtype != dtype and not torch.is_autocast_enabled(tokens.device.type)):
        allowed = " or ".join(str(allowed) for allowed in types)
        return f"tokens are {tokens.dtype} and weights {experts.up_weight.dtype}; both must be {allowed}"
    return None
