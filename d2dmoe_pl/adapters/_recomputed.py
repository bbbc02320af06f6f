"""An elementwise function that a model computes outside of any module, made one by what was seen of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from d2dmoe_pl.adapters._ffn_nodes import Node, aten

# operators that are all of an activation; as modules, kernels know them
KNOWN: dict[Any, Any] = {
    aten.relu: nn.ReLU,
    aten.gelu: nn.GELU,
    aten.silu: nn.SiLU,
    aten.tanh: nn.Tanh,
    aten.sigmoid: nn.Sigmoid,
}


class Recomputed(nn.Module):
    """An elementwise function that a model computes outside of any module, step by step as it does.

    Args:
        steps: An operator each, its arguments, with places for tensors, and the names of the last of them.
    """

    def __init__(self, steps: Sequence[tuple[Any, Any, tuple[str, ...]]]) -> None:
        super().__init__()
        self.steps = list(steps)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., n)`` to the same shape."""
        known = [x]
        for op, given, keys in self.steps:
            values = tree_map_only(Place, lambda place: known[place.index], given)
            args = values[: len(values) - len(keys)]
            known.append(op(*args, **dict(zip(keys, values[len(values) - len(keys) :], strict=True))))
        return known[-1]

    def __getstate__(self) -> dict[str, Any]:
        """With operators by name, since they cannot be pickled themselves."""
        return {**self.__dict__, "steps": [(str(op), given, keys) for op, given, keys in self.steps]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        steps = [(attrgetter(op)(torch.ops), *rest) for op, *rest in state["steps"]]
        super().__setstate__({**state, "steps": steps})

    def extra_repr(self) -> str:
        return ", ".join(str(op) for op, _, _ in self.steps)


@dataclass(frozen=True)
class Place:
    """Stands for a tensor: what the function takes, 0, or what a step gives, counted from 1."""

    index: int


def recomputed(pre: Node, post: Node) -> nn.Module:
    """A module that computes ``post`` from ``pre``, and changes nothing in place."""
    order: dict[Node, int] = {pre: 0}

    def visit(node: Node) -> None:
        for each in node.nodes():
            if each not in order:
                visit(each)
        order.setdefault(node, len(order))

    visit(post)
    nodes = [node for node in order if node is not pre]
    steps = [
        (_out_of_place(node), tree_map_only(Node, lambda each: Place(order[each]), node.inputs[0]), node.inputs[1])
        for node in nodes
    ]
    if len(steps) == 1:
        op, given, keys = steps[0]
        known = KNOWN.get(op.overloadpacket)
        if known is not None and len(given) == 1 + len(keys):
            return known(**dict(zip(keys, given[1:], strict=True)))
    return Recomputed(steps)


def is_in_place(node: Node) -> bool:
    """Whether the operator that gave ``node`` has put it where what it was given had been."""
    return getattr(node.packet, "__name__", "").endswith("_")


def _out_of_place(node: Node) -> Any:
    if not is_in_place(node):
        return node.op
    return getattr(getattr(aten, node.packet.__name__.removesuffix("_")), node.op._overloadname)
