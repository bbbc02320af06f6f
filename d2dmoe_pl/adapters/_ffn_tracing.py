"""Finding FFNs in a model that nobody described, by what one call of it computes from what.

Where possible, nothing is calculated: the call runs on fake tensors, which have shapes alone. What is found is to be
proved on numbers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._ffn_nodes import Node
from d2dmoe_pl.adapters._seen_dropout import SeesDropout
from d2dmoe_pl.borrowed_tensors import Borrowing, own_tensors
from d2dmoe_pl.hooks import hooked


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


@dataclass
class Dropped:
    """A tensor that the call would drop from if the model were trained.

    Attributes:
        node: It.
        kind: What the function is called that drops.
        p: Its rate.
        owner: The innermost module that was running.
        is_module: Whether that is a module for dropout, and nothing else.
    """

    node: Node
    kind: str
    p: float
    owner: str
    is_module: bool


class Trace(TorchDispatchMode):
    """What each tensor of a call of a model is made of.

    Attributes:
        calls: Of modules with one tensor in and one out, in order.
        linear: Of those, the calls of linear modules, by the module's name.
        dropouts: What would be dropped from, in order.
        used_elsewhere: Names of linear modules whose weights something else has used than the module itself.
    """

    def __init__(self, linear: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.linear: dict[str, list[Call]] = {}
        self.dropouts: list[Dropped] = []
        self.used_elsewhere: set[str] = set()
        self._names = {module: name for name, module in linear.items()}
        self._owner: dict[int, str] = {}  # by the id of a parameter that stands in for a linear module's
        self._running: list[str] = []  # linear modules
        self._inside: list[tuple[str, nn.Module]] = []  # all of them
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
                yield module.register_forward_pre_hook(partial(self.begin, name))
                yield module.register_forward_hook(partial(self.end, name), with_kwargs=True)

        with hooked(handles()), torch.no_grad(), SeesDropout(self.drop):
            yield

    def drop(self, tensor: Tensor, kind: str, p: float) -> None:
        """Say that the function ``kind`` would drop from ``tensor`` with probability ``p``."""
        owner, module = self._inside[-1] if self._inside else ("", None)
        self.dropouts.append(Dropped(self.node(tensor), kind, p, owner, isinstance(module, _DropoutNd)))

    def begin(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of all modules."""
        self._inside.append((name, module))
        if module in self._names:
            self._running.append(self._names[module])

    def end(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """A forward hook of all modules."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        self._inside.pop()
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


@torch.inference_mode(False)  # in which operators such as dropout would not be seen as what they are made of
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
