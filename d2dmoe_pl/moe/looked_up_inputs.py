"""Which inputs of an exported model are looked up in tables, such as ids of tokens: a compiled program that is given
one that is in no table ends the process.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

EMBEDDING = "aten::embedding"
# by the names of operators: where the table is among arguments, and where what is looked up in it
LOOKUPS = {EMBEDDING: (0, 1), "aten::index": (0, 1), "aten::index_select": (0, 2)}
# values come out as they are, at most fewer or in other places
KEEPING = {
    *("aten::_to_copy", "aten::alias", "aten::clone", "aten::contiguous", "aten::detach", "aten::expand"),
    *("aten::flatten", "aten::permute", "aten::reshape", "aten::select", "aten::slice", "aten::squeeze", "aten::to"),
    *("aten::transpose", "aten::unflatten", "aten::unsqueeze", "aten::view"),
}


def looked_up_inputs(program: torch.export.ExportedProgram) -> tuple[Mapping[Node, int], int | None]:
    """What the values of inputs must be below, and not negative either, so that they are in the tables of a program.

    Returns:
        For each such placeholder the number of rows of the smallest of its tables; and that of the smallest table that
        what is computed is looked up in, such as positions; None if none is.

    Example:
        >>> import torch
        >>> from d2dmoe_pl.moe.looked_up_inputs import looked_up_inputs
        >>> ids = torch.zeros(1, 3, dtype=torch.int64)
        >>> rows, of_computed = looked_up_inputs(torch.export.export(torch.nn.Embedding(7, 2), (ids,)))
        >>> list(rows.values()), of_computed
        ([7], None)
    """
    names = {name for name in program.graph_signature.user_inputs if isinstance(name, str)}
    rows: dict[Node, int] = {}
    of_computed: list[int] = []
    for node in program.graph.nodes:
        for indices, size in _lookups(node):
            origin = _origin(indices)
            if origin.op == "placeholder" and origin.name in names:
                rows[origin] = min(size, rows.get(origin, size))
            elif _operator(node) == EMBEDDING:
                of_computed.append(size)
    return rows, min(of_computed, default=None)


def _operator(node: Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def _lookups(node: Node) -> Iterator[tuple[Node, int]]:
    """What a node looks up, and in how many rows."""
    if _operator(node) not in LOOKUPS:
        return
    of_table, of_indices = LOOKUPS[_operator(node)]
    table: Any = node.args[of_table]
    given: Any = node.args[of_indices]
    for place, indices in enumerate(given if isinstance(given, list | tuple) else [given]):
        dimension: Any = node.args[1] if _operator(node) == "aten::index_select" else place
        size = table.meta["val"].shape[dimension]
        if indices is not None and isinstance(size, int) and indices.meta["val"].dtype != torch.bool:
            yield indices, size


def _origin(node: Node) -> Node:
    """Where the values of a node come from as they are."""
    while _operator(node) in KEEPING and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
