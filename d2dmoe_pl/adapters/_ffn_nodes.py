"""The tensors of a traced call, and what each is made of."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
SAME = {aten.view, aten._unsafe_view, aten.reshape, aten.alias, aten.detach, aten.clone, aten.contiguous}
HALVES = {aten.split, aten.split_with_sizes, aten.chunk, aten.slice}
_ACTIVATIONS = (
    *("relu", "gelu", "silu", "mish", "elu", "celu", "leaky_relu", "softplus", "hardtanh", "hardswish", "hardsigmoid"),
    *("sigmoid", "tanh", "threshold", "softshrink", "hardshrink"),
)
_ARITHMETIC = (
    *("erf", "exp", "pow", "abs", "mul", "add", "sub", "div", "neg", "square", "clamp", "clamp_min", "rsub", "sqrt"),
    *("maximum", "log1p"),
)
# each also as it is done in place, where it can be
ELEMENTWISE = {
    getattr(aten, name + end)
    for name in (*_ACTIVATIONS, *_ARITHMETIC)
    for end in ("", "_")
    if hasattr(aten, name + end)
}


@dataclass(eq=False)
class Node:
    """A tensor of the call.

    Attributes:
        op: What gave it: an operator, the name of a linear module, or None where that was not seen.
        inputs: The operator's arguments, with nodes in the place of tensors; of a linear module, what it was given.
        part: Which of several outputs it is.
        used_by: Those that were made of it.
        shape: Of the tensor.
        is_of_input: Whether anything of it is from what the model was given.
    """

    op: Any
    inputs: tuple[Any, ...]
    part: int | None = None
    used_by: list["Node"] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    is_of_input: bool = False

    def nodes(self) -> list["Node"]:
        """The tensors among the inputs."""
        return [each for each in tree_leaves(self.inputs) if isinstance(each, Node)]

    @property
    def packet(self) -> Any:
        """The operator without its overload."""
        return getattr(self.op, "overloadpacket", None)


def made_of(node: Node) -> set[Node] | None:
    """The outputs of linear modules that ``node`` is computed from, elementwise; None where it is of anything else."""
    found: set[Node] = set()
    pending, seen = [node], set()
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        if isinstance(each.op, str):
            found.add(each)
        elif each.packet in ELEMENTWISE | HALVES or (each.packet in SAME and is_same_width(each)):
            pending += each.nodes()
        else:
            return None
    return found


def without_views(node: Node) -> Node:
    """What ``node`` is a view of, of the same last dimension."""
    while node.packet in SAME and is_same_width(node):
        node = node.nodes()[0]
    return node


def is_same_width(view: Node) -> bool:
    """Whether a view has the last dimension of what it is a view of."""
    return view.nodes()[0].shape[-1:] == view.shape[-1:]


def between(node: Node, ends: set[Node]) -> Iterator[Node]:
    """All nodes on the ways from ``ends`` to ``node``, itself among them, ``ends`` not."""
    pending, seen = [node], set(ends)
    while pending:
        each = pending.pop()
        if each not in seen:
            seen.add(each)
            yield each
            pending += each.nodes()


def without_reshaping(node: Node) -> Node:
    """What ``node`` is a view of that has three dimensions, if it has two itself: texts whose tokens are in one row."""
    first = node
    while len(first.shape) == 2 and first.packet in SAME and is_same_width(first):
        first = first.nodes()[0]
    return first if len(first.shape) == 3 else node
