"""What a model does with the modules that int8 is for, found out by a call of it, before any of them is replaced."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from d2dmoe_pl.hooks import has_own_forward, hooked


class Trial:
    """Watches a call of a model.

    Args:
        model: The model.
        candidates: The modules that may be put in int8, by name.

    Attributes:
        called: The modules that ran.
        read: The ids of candidates' weights that something has computed with that is not the module they are of.
        unlike: The linear modules that gave something else than the product with their weight.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[str, nn.Module]) -> None:
        self.called: set[nn.Module] = set()
        self.read: set[int] = set()
        self.unlike: set[nn.Module] = set()
        self._model = model
        self._holders: dict[int, set[nn.Module]] = {}
        for module in candidates.values():
            weight = module._parameters.get("weight")
            if weight is not None:
                self._holders.setdefault(id(weight), set()).add(module)
        self._other_code = {module for module in candidates.values() if _has_other_forward(module)}
        self._running: list[nn.Module] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the call in the body."""

        def handles() -> Iterator[Any]:
            for module in self._model.modules():
                yield module.register_forward_pre_hook(self._begin)
                yield module.register_forward_hook(self._end)

        with hooked(handles()), _Reads(self._see):
            yield

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.called.add(module)
        self._running.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running[-1] is not module:  # of calls that were broken off
            self._running.pop()
        if module in self._other_code and not _is_product(module, args, output):
            self.unlike.add(module)
        self._running.pop()

    def _see(self, given: Any, output: Any) -> None:
        if not any(isinstance(each, Tensor) for each in tree_leaves(output)):  # its type, its shape
            return
        for each in tree_leaves(given):
            holders = self._holders.get(id(each))
            if holders is not None and (not self._running or self._running[-1] not in holders):
                self.read.add(id(each))


class _Reads(TorchFunctionMode):
    def __init__(self, see: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._see((args, kwargs), output)
        return output


def _has_other_forward(module: nn.Module) -> bool:
    """Whether a linear module has a class of its own for what it computes."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _is_product(module: Any, args: Any, output: Any) -> bool:
    if not isinstance(output, Tensor) or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    expected = F.linear(args[0].to(module.weight.dtype), module.weight, module.bias).to(output.dtype)
    tolerance = 1e-4 if module.weight.dtype == torch.float32 else 5e-2
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=tolerance, atol=tolerance)


def why_left(module: nn.Module) -> str | None:
    """What a module does beside its own, as its class or somebody has it do, that int8 would lose; None if nothing."""
    is_computed = "weight" not in module._parameters  # by hooks of pruning or weight_norm, which are done with then
    hooks = bool(module._forward_hooks) or (bool(module._forward_pre_hooks) and not is_computed)
    if hooks:
        return "has hooks"
    if has_own_forward(module):
        return "has a forward of its own"
    own = {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    if isinstance(module, nn.Linear) and not is_computed and own:
        return f"has a parameter {min(own)} beside its weight"
    return None
