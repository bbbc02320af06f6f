"""A model that is done changing, made as fast as it can be on the machine at hand."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.execution.cpu import compile_failure
from d2dmoe_pl.moe.experts.experts import leave_inference_mode_
from d2dmoe_pl.moe.graph_passes import pass_over_graphs

CODE_GUARDS = ("BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH", "MODULE_MATCH")


def optimize_(model: nn.Module) -> None:
    """Have ``model`` compiled by ``torch.compile``, for inference and any number of samples and tokens.

    The first calls compile, for about a minute each: one for a batch of one sample, one for all others. ``set_tau_``
    can be called as before; a gate, router, backend or type that changes is compiled for anew. Nothing can be trained
    any more, and what is saved is the model as it was. Hooks, such as those that watch decisions, leave in pieces what
    is compiled for batches of that shape, also when they are gone: watch a model that is not optimised.

    On the CPU, operators are called from C++, attention over short sequences is this package's, and linear layers in
    int8 that share an input, such as those of queries, keys and values, round it once. Where these are at once followed
    by such attention, all is one operator, and with VNNI but no matrix unit its products are of integers of 12 bits.
    What ``model`` holds is compared at every call with what was compiled; that functions and classes are still the same
    ones is not.

    Args:
        model: A model at any stage, in the type that it is to run in.

    Raises:
        ConfigError: If it is optimised already.

    Example:
        >>> import timm, torch
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, optimize_
        >>> model = timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> optimize_(model)
        >>> model.training, any(parameter.requires_grad for parameter in model.parameters())
        (False, False)
    """
    check(model._compiled_call_impl is None, f"{type(model).__name__}: is optimised already")
    leave_inference_mode_(model)
    model.eval().requires_grad_(False)  # without gradients, experts run on compiled kernels
    model._compiled_call_impl = torch.compile(_own_call(model), dynamic=True, options=_options(model))


def _own_call(model: nn.Module) -> Any:
    """The call of ``model``, hooks and all, as a function with a code object of its own.

    What is compiled is kept by code object, and for eight models at most.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)


def _options(model: nn.Module) -> dict[str, Any]:
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if not is_on_cpu or compile_failure() is not None:
        return {}
    return {
        "post_grad_custom_pre_pass": pass_over_graphs(),
        "guard_filter_fn": of_what_is_held,
        "cpp_wrapper": True,
        "size_asserts": False,  # of inputs, which guards have compared, and of what operators have said that they give
    }


def of_what_is_held(guards: Sequence[Any]) -> list[bool]:
    """Of each of the compiler's guards, whether it compares anything but functions, classes and modules of Python."""
    return [guard.guard_type not in CODE_GUARDS for guard in guards]
