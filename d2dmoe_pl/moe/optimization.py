"""A model that is done changing, made as fast as it can be on the machine at hand."""

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any

import torch
from torch import nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.execution.cpu import compile_failure
from d2dmoe_pl.moe.experts.experts import leave_inference_mode_

CODE_GUARDS = ("BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH", "MODULE_MATCH")


def optimize_(model: nn.Module) -> None:
    """Have ``model`` compiled by ``torch.compile``, for inference and any number of samples and tokens.

    The first calls compile, for about a minute each: one for a batch of one sample, one for all others. ``set_tau_``
    can be called as before; a gate, router, backend or type that changes is compiled for anew. Nothing can be trained
    any more, and what is saved is the model as it was. Hooks, such as those that watch decisions, leave in pieces what
    is compiled for batches of that shape, also when they are gone: watch a model that is not optimised.

    On the CPU, operators are called from C++, attention over short sequences is this package's, and linear layers in
    int8 that share an input, such as those of queries, keys and values, round it once. What ``model`` holds is compared
    at every call with what was compiled; that functions and classes are still the same ones is not.

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


def pass_over_graphs() -> Any:
    """What inductor is given to have graphs for the CPU use this package's attention and join linear layers in int8."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # noqa: PLC0415 (takes a second)

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            use_short_attention_(graph)
            join_int8_linears_(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return Pass()


def of_what_is_held(guards: Sequence[Any]) -> list[bool]:
    """Of each of the compiler's guards, whether it compares anything but functions, classes and modules of Python."""
    return [guard.guard_type not in CODE_GUARDS for guard in guards]


def use_short_attention_(graph: torch.fx.Graph) -> None:
    """Have the attention of a graph of ATen's operators for the CPU computed by this package's, where it is plain."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    for node in graph.find_nodes(op="call_function", target=flash):
        query, key, value, dropout, causal = (*node.args, 0.0, False)[:5]
        kwargs = node.kwargs
        outputs = list(node.users)
        is_plain = not (kwargs.get("dropout_p", dropout) or kwargs.get("is_causal", causal))
        if is_plain and all(user.target is operator.getitem and user.args[1] == 0 for user in outputs):
            arguments = (query, key, value, kwargs.get("attn_mask"), kwargs.get("scale"))
            own = _call_before(graph, node, torch.ops.d2dmoe_pl.attention_cpu.default, arguments)
            for output in outputs:
                output.replace_all_uses_with(own)
                graph.erase_node(output)
            graph.erase_node(node)


def join_int8_linears_(graph: torch.fx.Graph) -> None:
    """Have linear layers in int8 that share an input, such as queries, keys and values, round it once."""
    sharing: dict[tuple[torch.fx.Node, int], list[torch.fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.d2dmoe_pl.int8_linear_cpu.default):
        rows: Any = node.args[0]
        weight: Any = node.args[1]  # whose width is a number, where that of rows may be a symbol
        sharing.setdefault((_source(rows), int(weight.meta["val"].shape[1])), []).append(node)
    places = {node: place for place, node in enumerate(graph.nodes)}
    for nodes in sharing.values():
        weights: list[Any] = [node.args[1:] for node in nodes]
        first = min(nodes, key=places.__getitem__)
        is_there = all(places[part] < places[first] for own in weights for part in own if part is not None)
        if len(nodes) > 1 and is_there:
            arguments = (first.args[0], *map(list, zip(*weights, strict=True)))
            joined = _call_before(graph, first, torch.ops.d2dmoe_pl.int8_linears_cpu.default, arguments)
            ends = [*accumulate((own[0].meta["val"].shape[0] for own in weights), initial=0)]
            parts = [
                _call_before(graph, first, torch.ops.aten.slice.Tensor, (joined, 1, *place)) for place in pairwise(ends)
            ]
            for node, part in zip(nodes, parts, strict=True):
                node.replace_all_uses_with(part)
                graph.erase_node(node)


def _source(rows: Any) -> torch.fx.Node:
    """What ``rows`` is a view of: views of the same numbers, in order, of the same width are the same rows."""
    while rows.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default):
        rows = rows.args[0]
    return rows


def _call_before(graph: torch.fx.Graph, node: torch.fx.Node, target: Any, arguments: tuple) -> torch.fx.Node:
    """A call that is made before ``node``, which knows the shapes and strides that it gives."""
    with graph.inserting_before(node):
        call = graph.call_function(target, arguments)
    call.meta["val"] = target(*torch.fx.map_arg(arguments, lambda argument: argument.meta["val"]))
    return call
