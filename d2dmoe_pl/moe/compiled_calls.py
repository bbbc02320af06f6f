"""Calls of a model that programs run, where they can: what they are for, and whether the model is what it was."""

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.token_context import is_recorded
from d2dmoe_pl.notices import notice

MOST_SHAPES = 4096  # that are remembered
HOOKS = "something watches it by hooks"
CAPTURING = "transformers.utils.output_capturing"
PLAIN = (Tensor, nn.Parameter)
# what is said of sizes is made of these
ARITHMETIC = (ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.expr_context)
SIGNS = (ast.operator, ast.cmpop, ast.boolop, ast.unaryop)


@dataclass(frozen=True)
class Input:
    """A tensor that a program takes.

    Attributes:
        name: Of the model's argument.
        dtype: Of torch.
        sizes: Of each dimension its size, or what it is called, its least and its largest.
        below: Of what is looked up in a table, such as ids of tokens, how many rows that has; None for other values.
    """

    name: str
    dtype: str
    sizes: tuple[int | tuple[str, int, int], ...]
    below: int | None = None

    def holds(self, tensor: Tensor) -> bool:
        """Whether all values are in the table that they are looked up in."""
        if self.below is None or tensor.numel() == 0:
            return True
        low, high = torch.aminmax(tensor)
        return int(low) >= 0 and int(high) < self.below


@dataclass(frozen=True)
class Relation:
    """What sizes of inputs must be to each other.

    Attributes:
        said: In Python's arithmetic; ``size_1_0`` is the first dimension's of the second input.

    Raises:
        ConfigError: For anything but arithmetic.

    Example:
        >>> from d2dmoe_pl.moe.compiled_calls import Relation
        >>> Relation("size_0_1 % 4 == 0").holds({"size_0_1": 12})
        True
    """

    said: str

    def __post_init__(self) -> None:
        try:
            tree = ast.parse(self.said, mode="eval")
        except SyntaxError:
            tree = None
        is_plain = tree is not None and all(isinstance(node, (*ARITHMETIC, *SIGNS)) for node in ast.walk(tree))
        check(is_plain, f"sizes of inputs: {self.said!r} is no arithmetic; must be, for what is compiled ahead of time")
        object.__setattr__(self, "_code", compile(self.said, "<sizes>", "eval"))

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it does, of sizes by their names."""
        return bool(eval(self._code, {"__builtins__": {}}, dict(sizes)))  # type: ignore[attr-defined] # arithmetic alone


@dataclass(frozen=True)
class Program:
    """What runs a model for inputs of some sizes.

    Attributes:
        inputs: In order.
        relations: That sizes must have beside that.
        run: Takes tensors by place, and gives a list of them; None where it is told about only.
        held: Tensors that it reads where they are, by name.
    """

    inputs: tuple[Input, ...]
    relations: tuple[Relation, ...]
    run: Any = None
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` makes the same program of, to be told about only."""
        return {
            "inputs": [asdict(each) for each in self.inputs],
            "relations": [relation.said for relation in self.relations],
        }

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> "Program":
        """The program of which :meth:`as_json` gave ``made``."""
        inputs = []
        for each in made["inputs"]:
            sizes = tuple(size if isinstance(size, int) else tuple(size) for size in each["sizes"])
            inputs.append(Input(each["name"], each["dtype"], sizes, each.get("below")))
        return cls(tuple(inputs), tuple(map(Relation, made["relations"])))

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is for tensors of these types and sizes, one for each of its inputs; samples come first in all."""
        found: dict[str, int] = {}
        for tensor, given in zip(tensors, self.inputs, strict=True):
            if tensor.dtype != getattr(torch, given.dtype) or tensor.dim() != len(given.sizes):
                return False
            for place, (size, asked) in enumerate(zip(tensor.shape, given.sizes, strict=True)):
                name, low, high = (str(asked), asked, asked) if isinstance(asked, int) else asked
                is_same = found.setdefault("samples" if place == 0 else name, size) == size
                if not is_same or not low <= size <= high:
                    return False

        sizes = {f"size_{i}_{j}": size for i, each in enumerate(tensors) for j, size in enumerate(each.shape)}
        return all(relation.holds(sizes) for relation in self.relations)


class CompiledCalls:
    """What calls ``model`` in the place of its own call, by programs where that gives the same.

    Args:
        model: The model; without gradients, in evaluation mode.
        programs: All of the same inputs.
        settings: All other arguments that a call must have for them.
        output: How their tensors make up what the model gives.
    """

    def __init__(
        self,
        model: nn.Module,
        programs: Sequence[Program],
        settings: Mapping[str, Any],
        output: pytree.TreeSpec,
    ) -> None:
        self._model = model
        self._programs = programs
        self._names = [given.name for given in programs[0].inputs]
        self._settings = settings
        self._output = output
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._known: dict[tuple, Program | None] = {}
        self._before = Unchanged(model)
        self._said: set[str] = set()

    @property
    def passed_over(self) -> list[str]:
        """Why calls were run as if there were no programs, if any were."""
        return sorted(self._said)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        tensors = self._tensors(args, kwargs)
        if isinstance(tensors, str):
            self._say(tensors)
            return self._model._call_impl(*args, **kwargs)
        key = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        program = self._known.get(key, self)
        if program is self:
            if len(self._known) >= MOST_SHAPES:
                self._known.clear()
            program = self._known[key] = next((each for each in self._programs if each.takes(tensors)), None)
        if program is None:
            sizes = ", ".join(f"{name} {list(each.shape)}" for name, each in zip(self._names, tensors, strict=True))
            self._say("sizes or types of inputs are none of those that it was compiled for", f": {sizes}")
            return self._model._call_impl(*args, **kwargs)
        changed = self._before.difference()
        if changed is not None:
            self._say(changed)
            return self._model._call_impl(*args, **kwargs)
        assert isinstance(program, Program)
        if not all(given.holds(tensor) for given, tensor in zip(program.inputs, tensors, strict=True)):
            return self._model._call_impl(*args, **kwargs)  # which says so; a program would end the process
        return pytree.tree_unflatten(program.run(*tensors), self._output)

    def _tensors(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor] | str:
        """What programs are given; or why there is none for such a call."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs} if args else kwargs
        if len(given) != len(self._names) + len(self._settings):
            given = {name: value for name, value in given.items() if value is not None}
        tensors = []
        for name in self._names:
            value = given.get(name)
            if not isinstance(value, Tensor) or type(value) not in PLAIN or value.device.type != "cpu":
                return f"it was compiled for calls with {name}, a tensor on the CPU"
            if value.requires_grad and torch.is_grad_enabled():
                return f"gradients are wanted of {name}"
            tensors.append(value if value.is_contiguous() else value.contiguous())
        if len(given) != len(tensors) + len(self._settings):
            others = set(given) - {*self._names, *self._settings}
            if others:
                return f"it was compiled for calls without {', '.join(sorted(others))}"
        for name, value in self._settings.items():
            if name not in given or given[name] != value:
                return f"it was compiled for calls with {name}={value}"
        if torch.is_autocast_enabled("cpu"):
            return "types are by autocast"
        return "it is compiled anew, or traced" if is_recorded() else tensors

    def _say(self, reason: str, detail: str = "") -> None:
        if reason not in self._said:
            self._said.add(reason)
            name = type(self._model).__name__
            notice(f"{name}: {reason}{detail}; such calls are run as if it were not compiled")


class Unchanged:
    """Whether a model is what it was: weights, modules, hooks, configuration, settings of gates; asked at each call.

    Args:
        model: As it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        parts = [config, *(each for each in getattr(config, "__dict__", {}).values() if hasattr(each, "to_dict"))]
        self._configs = [vars(each) for each in parts if hasattr(each, "__dict__")]
        self._modules = modules = list(model.modules())
        self._tensors = [place for each in modules for place in (each._parameters, each._buffers) if place]
        self._children = [each._modules for each in modules if each._modules]
        self._hooks = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._watching = self._hooks_at_work()
        self._parameters = list(model.parameters())  # which may get other values and stay the same objects
        layers = moe_layers(model).values()
        self._routed = [(layer, layer.get_gate(), layer.own_experts) for layer in layers if layer.gate is not None]
        self._before = self._now()

    def difference(self) -> str | None:
        """What is not as it was; None if all is."""
        now = self._now()
        if now == self._before:
            return None
        if now[HOOKS] != self._before[HOOKS] and self._hooks_at_work() == self._watching:
            self._before[HOOKS] = now[HOOKS]
            return self.difference()
        return next(reason for reason, value in now.items() if value != self._before[reason])

    def _hooks_at_work(self) -> int:
        """Without those that transformers leaves once a call has asked for hidden states: in others they do nothing."""
        return sum(getattr(hook, "__module__", "") != CAPTURING for hooks in self._hooks for hook in hooks.values())

    def _now(self) -> dict[str, Any]:
        # mapped and chained: a loop in Python over all that a model is made of would take as long as a layer
        return {
            "it is in training mode": sum(map(attrgetter("training"), self._modules)),
            "its configuration is another": [*map(dict, self._configs)],
            "gradients are wanted of its weights": torch.is_grad_enabled()
            and any(map(attrgetter("requires_grad"), self._parameters)),
            "modules of it were replaced": _ids(self._children),
            HOOKS: sum(map(len, self._hooks)),
            "weights of it were replaced": _ids(self._tensors),
            "weights of it have moved, or are of another type": [*map(Tensor.data_ptr, self._parameters)],
            "gates, backends or what watches them are others": [
                (layer.observer, layer.softness, len(layer._work_observers), gate.config.k, experts.backend)
                for layer, gate, experts in self._routed
            ],
        }


def _ids(places: Sequence[dict[str, Any]]) -> list[int]:
    return [*map(id, chain.from_iterable(map(dict.values, places)))]


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that modules of ``model`` have: parameters, buffers, and others, such as the ``tau`` of a gate."""
    return dict(_held(model))


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def named_arguments(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model`` by their names; those that it gathers under a name keep their own."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named
