"""What is changed in the graph that is compiled of a model for the CPU, so that it calls this package's operators."""

import math
import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

ATEN = torch.ops.aten
VIEWS = (
    ATEN.view.default,
    ATEN.permute.default,
    ATEN.transpose.int,
    ATEN.select.int,
    ATEN.slice.Tensor,
    ATEN.unbind.int,
    ATEN.split.Tensor,
    ATEN.split_with_sizes.default,
    ATEN.unsqueeze.default,
    ATEN.squeeze.dim,
    operator.getitem,
)


def pass_over_graphs() -> Any:
    """What inductor is given to have graphs for the CPU use this package's attention and join linear layers in int8."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # noqa: PLC0415 (takes a second)

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            use_operators_(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return Pass()


def use_operators_(graph: torch.fx.Graph) -> None:
    """Have a graph of ATen's operators call this package's where these are faster."""
    use_short_attention_(graph)
    fuse_int8_self_attention_(graph)
    join_int8_linears_(graph)


def use_short_attention_(graph: torch.fx.Graph) -> None:
    """Have the attention of a graph of ATen's operators for the CPU computed by this package's, where it is plain.

    In a graph with linear layers in int8 it may round as well, where that is faster.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    in_int8 = any(
        True for _ in graph.find_nodes(op="call_function", target=torch.ops.d2dmoe_pl.int8_linear_cpu.default)
    )
    for node in graph.find_nodes(op="call_function", target=flash):
        query, key, value, dropout, causal = (*node.args, 0.0, False)[:5]
        kwargs = node.kwargs
        outputs = list(node.users)
        is_plain = not (kwargs.get("dropout_p", dropout) or kwargs.get("is_causal", causal))
        if is_plain and all(user.target is operator.getitem and user.args[1] == 0 for user in outputs):
            arguments = (query, key, value, kwargs.get("attn_mask"), kwargs.get("scale"), in_int8)
            own = _call_before(graph, node, torch.ops.d2dmoe_pl.attention_cpu.default, arguments)
            for output in outputs:
                output.replace_all_uses_with(own)
                graph.erase_node(output)
            graph.erase_node(node)


def fuse_int8_self_attention_(graph: torch.fx.Graph) -> None:
    """Have queries, keys and values that linear layers in int8 give computed with the attention that takes them.

    Layers are one for all three, side by side, or one for each, of the same input.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.d2dmoe_pl.attention_cpu.default):
        mask, scale = node.args[3:5]
        found = [_linear_of_heads(part) for part in node.args[:3]]
        given: Any = node.args[0]
        batch, heads, length, width = given.meta["val"].shape
        if None in found or not isinstance(heads * width, int):
            continue
        linears, firsts = zip(*found, strict=True)
        all_in_one = len(set(linears)) == 1
        outputs = heads * width * (3 if all_in_one else 1)
        expected = (0, outputs // 3, 2 * outputs // 3) if all_in_one else (0, 0, 0)
        layers = list(dict.fromkeys(linears))
        sources = {_source(linear.args[0]) for linear in layers}
        x = next(iter(sources))
        is_whole = (
            len(layers) in (1, 3)
            and len(sources) == 1
            and all(_is_same(first, place) for first, place in zip(firsts, expected, strict=True))
            and all(_is_same(linear.meta["val"].shape[1], outputs) for linear in layers)
            and _is_shape(x, (batch, length, layers[0].args[1].meta["val"].shape[1]))
            and all(_is_shape(part, (batch, heads, length, width)) for part in node.args[:3])
        )
        if is_whole:
            weights = map(list, zip(*(linear.args[1:] for linear in layers), strict=True))
            arguments = (x, *weights, heads, mask, scale)
            own = _call_before(graph, node, torch.ops.d2dmoe_pl.int8_self_attention_cpu.default, arguments)
            node.replace_all_uses_with(own)
    graph.eliminate_dead_code()


def _linear_of_heads(part: Any) -> tuple[torch.fx.Node, Any] | None:
    """The linear layer in int8 whose outputs ``part`` ``(B, H, L, d)`` is a view of, and their first column.

    None if there is no such layer, or heads do not lie side by side in its outputs ``(B * L, N)``.
    """
    node = part
    while node.target in VIEWS or (node.target is ATEN.reshape.default and _is_dense(node.args[0])):
        node = node.args[0]
    if node.target is not torch.ops.d2dmoe_pl.int8_linear_cpu.default:
        return None
    value, outputs = part.meta["val"], node.meta["val"].shape[1]
    *_, length, width = value.shape
    is_side_by_side = _are_strides(value, (length * outputs, width, outputs, 1))
    return (node, value.storage_offset()) if is_side_by_side else None


def _is_dense(node: torch.fx.Node) -> bool:
    """Whether any other shape of what ``node`` gives is a view of it."""
    value = node.meta["val"]
    return _are_strides(value, [math.prod(value.shape[place + 1 :]) for place in range(value.dim())])


def _are_strides(value: Any, strides: Sequence[Any]) -> bool:
    """Whether elements of ``value`` are known to lie so far apart, in dimensions of more than one."""
    sizes = zip(value.shape, value.stride(), strides, strict=True)
    return all(_is_same(size, 1) or _is_same(found, expected) for size, found, expected in sizes)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415 (takes half a second)

    return bool(statically_known_true(a == b))


def _is_shape(node: torch.fx.Node, shape: Sequence[Any]) -> bool:
    found = node.meta["val"].shape
    return len(found) == len(shape) and all(map(_is_same, found, shape))


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
