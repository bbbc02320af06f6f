"""What stands in the way of compiled kernels, which compute no gradients and know some functions and types only."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _everywhere  # where hooks on all modules are

from d2dmoe_pl.moe.experts.activation_kinds import KNOWN
from d2dmoe_pl.moe.experts.experts import Experts


def needs_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd would want to go back through what is computed from these; or forward, or many times at once."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_transformed() -> bool:
    """Whether a call is one of torch.func's transforms, or of dual tensors, which require no gradients."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def is_transformed_or_traced() -> bool:
    """Both at once, as it is asked of every layer at every call."""
    if torch.compiler.is_compiling():
        return is_traced()
    return _is_transformed() or torch._C._is_tracing()


def is_watched(*modules: nn.Module) -> bool:
    """Whether a call of any, which a kernel would not make, is to be seen: by hooks, or by what stands for ``forward``.

    The latter is how accelerate brings weights that it keeps elsewhere, for the call alone.
    """
    if _everywhere._global_forward_hooks or _everywhere._global_forward_pre_hooks:
        return True
    for module in modules:  # noqa: SIM110 (any() takes longer, and this is asked of every layer at every call)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return False


def is_watched_by_itself(module: nn.Module) -> bool:
    """The same, but for hooks on all modules there are, which see nothing of one that is not needed."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_traced() -> bool:
    """Whether a call is exported to ONNX or traced by ``torch.jit``, neither of which can record our operators."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch.jit.is_tracing()


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
    if needs_gradients((tokens, *experts.weights)):
        return "has no gradients; run under torch.no_grad(), or train with 'auto', 'reference' or 'grouped'"
    if has_active_dropout(experts):
        return f"has no dropout, and p={experts.hidden_dropout.p} is active; call model.eval() first"
    if is_traced():
        return "no trace, and no file of ONNX, has a place for it; set_backend_(model, 'auto') first"
    if experts.activation_kind is None:
        return f"the activation {type(experts.activation).__name__} is not one of {', '.join(KNOWN)}"
    if is_watched(experts.activation, experts.hidden_dropout):
        return "has no hooks, and there are some on the activation, or on the dropout behind it"
    dtype, is_autocast = run_type(experts, tokens), torch.is_autocast_enabled(tokens.device.type)
    if dtype not in types or (tokens.dtype != dtype and not is_autocast):
        allowed = " or ".join(str(allowed) for allowed in types)
        if is_autocast:
            return f"autocast is to {dtype}; must be to {allowed}"
        return f"tokens are {tokens.dtype} and weights {experts.up_weight.dtype}; both must be {allowed}"
    return None
