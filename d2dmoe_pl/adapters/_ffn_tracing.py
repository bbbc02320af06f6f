"""Finding FFNs in a model that nobody described, by what one call of it computes from what.

Where possible, nothing is calculated: the call runs on fake tensors, which have shapes alone. What is found is to be
proved on numbers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.borrowed_tensors import Borrowing, own_tensors
from d2dmoe_pl.hooks import hooked

aten = torch.ops.aten
SAME = {aten.view, aten._unsafe_view, aten.reshape, aten.alias, aten.detach, aten.clone, aten.contiguous}
HALVES = {aten.split, aten.split_with_sizes, aten.chunk, aten.slice}
ELEMENTWISE = {
    *(aten.relu, aten.relu_, aten.gelu, aten.silu, aten.silu_, aten.mish, aten.elu, aten.leaky_relu, aten.softplus),
    *(aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.sigmoid, aten.tanh, aten.erf, aten.exp, aten.pow, aten.abs),
    *(aten.mul, aten.mul_, aten.add, aten.sub, aten.div, aten.neg, aten.square, aten.clamp, aten.clamp_min),
    *(aten.threshold, aten.rsub, aten.sqrt, aten.maximum, aten.log1p),
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


@dataclass
class Call:
    """One call of a module that takes a tensor and gives one.

    Attributes:
        name: Of the module.
        given: What it took.
        gave: What it gave.
    """

    name: str
    given: Node
    gave: Node


class Trace(TorchDispatchMode):
    """What each tensor of a call of a model is made of.

    Attributes:
        calls: Of modules with one tensor in and one out, in order.
        linear: Of those, the calls of linear modules, by the module's name.
        used_elsewhere: Names of linear modules whose weights something else has used than the module itself.
    """

    def __init__(self, linear: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.linear: dict[str, list[Call]] = {}
        self.used_elsewhere: set[str] = set()
        self._names = {module: name for name, module in linear.items()}
        self._owner: dict[int, str] = {}  # by the id of a parameter that stands in for a linear module's
        self._running: list[str] = []
        self._nodes: dict[int, Node] = {}
        self._kept: list[Tensor] = []  # so that no id is given twice

    def give(self, tensor: Tensor) -> Tensor:
        """Say that ``tensor`` is given to the model."""
        self._put(tensor, Node(None, (), is_of_input=True))
        return tensor

    def own(self, parameter: Tensor, name: str) -> None:
        """Say that ``parameter`` is one of the linear module ``name``."""
        self._owner[id(parameter)] = name
        self._kept.append(parameter)

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor, as it is now."""
        if id(tensor) not in self._nodes:
            self._put(tensor, Node(None, ()))
        return self._nodes[id(tensor)]

    def _put(self, tensor: Tensor, node: Node) -> None:
        node.shape = tuple(tensor.shape)
        node.is_of_input |= any(each.is_of_input for each in node.nodes())
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)
        for each in () if self._running else node.nodes():  # what linear modules do inside is theirs
            each.used_by.append(node)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            name = self._owner.get(id(tensor)) if isinstance(tensor, Tensor) else None
            if name is not None and name not in self._running:
                self.used_elsewhere.add(name)
        given = tree_map_only(Tensor, self.node, (*args, *kwargs.values()))
        keys = tuple(kwargs)
        result = func(*args, **kwargs)
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        for part, output in enumerate(outputs):
            if isinstance(output, Tensor):
                self._put(output, Node(func, (given, keys), part if len(outputs) > 1 else None))
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know which modules run in the body, without gradients."""

        def handles() -> Iterator[RemovableHandle]:
            for name, module in model.named_modules():
                if module in self._names:
                    yield module.register_forward_pre_hook(self.begin)
                yield module.register_forward_hook(partial(self.end, name), with_kwargs=True)

        with hooked(handles()), torch.no_grad():
            yield

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of linear modules."""
        self._running.append(self._names[module])

    def end(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """A forward hook of all modules."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if module in self._names:
            self._running.pop()
        if len(tensors) != 1 or kwargs or not isinstance(output, Tensor):
            return
        given = self.node(tensors[0])
        if module in self._names:
            self._put(output, Node(name, (given,)))
        self.calls.append(Call(name, given, self.node(output)))
        if module in self._names:
            self.linear.setdefault(name, []).append(self.calls[-1])


def trace(
    model: nn.Module, linear: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], call: Callable[[Any, Any], object]
) -> Trace:
    """Call a model, on fake tensors if it can be, and record what is made of what.

    Args:
        model: In evaluation mode.
        linear: Its linear modules by name.
        inputs: What it is given, by name.
        call: Calls the first, in the model's place, with the second, inputs under the same names.

    Raises:
        Exception: What the model raises, on fake tensors and, if it has any, on real ones.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # what it cannot do is tried otherwise, or raised
    try:
        return _trace_fake(model, linear, inputs, call)
    except Exception:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
    finally:
        logger.setLevel(before)
    traced = Trace(linear)
    for name, module in linear.items():
        for parameter in module.parameters(recurse=False):
            traced.own(parameter, name)
    with traced.watching(model), traced:
        call(model, {name: traced.give(tensor) for name, tensor in inputs.items()})
    return traced


def _trace_fake(
    model: nn.Module, linear: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], call: Callable[[Any, Any], object]
) -> Trace:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = own_tensors(model)
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        made.setdefault(id(tensor), mode.from_tensor(torch.empty_like(tensor, device="meta")))
    fake = {name: made[id(tensor)] for name, tensor in tensors.items()}
    traced = Trace(linear)
    for name, module in linear.items():
        for key in dict(module.named_parameters(recurse=False)):
            traced.own(fake[f"{name}.{key}"], name)

    given = {name: mode.from_tensor(tensor.to("meta")) for name, tensor in inputs.items()}
    with traced.watching(model), mode, traced:
        call(Borrowing(model, fake), {name: traced.give(tensor) for name, tensor in given.items()})
    return traced


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give the modules of ``model`` back the parts and plain settings that they had, whatever calls have changed.

    Some choose how they compute by a call's shapes, and keep to it (BigBird's attention, for short texts).
    """
    kept = [
        (module, dict(module._modules), {name: value for name, value in vars(module).items() if _is_plain(value)})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, parts, settings in kept:
            module._modules.clear()
            module._modules.update(parts)
            vars(module).update(settings)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


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
