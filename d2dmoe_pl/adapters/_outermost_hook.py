"""A hook that sees a module with all that others put around it later, such as LoRA or hooks of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class OutermostHook:
    """A hook on what stands at a path, looked after at each call of the module around it.

    Args:
        model: The model.
        path: Where.
        hook: A forward pre-hook, which is to run before all others, or a forward hook, which is to run after them.
        is_before: Which of them it is.
    """

    def __init__(self, model: nn.Module, path: str, hook: Callable[..., Any], is_before: bool) -> None:
        parent, _, self._rest = path.rpartition(".")
        self._around = model.get_submodule(parent)
        while parent and isinstance(self._around, nn.ModuleList | nn.ModuleDict):  # which nobody calls
            parent, _, attribute = parent.rpartition(".")
            self._around, self._rest = model.get_submodule(parent), f"{attribute}.{self._rest}"
        self._hook = hook
        self._is_before = is_before
        self._put()
        self._around_handle = self._around.register_forward_pre_hook(self._look_after)

    def remove(self) -> None:
        """Take it away, from wherever it is by now."""
        self._handle.remove()
        self._around_handle.remove()

    def is_outermost(self) -> bool:
        """Whether nothing has been put around it since it was looked after."""
        module = self._around.get_submodule(self._rest)
        ids = iter(module._forward_pre_hooks) if self._is_before else reversed(module._forward_hooks)
        return next(ids, None) == self._handle.id

    def _put(self) -> None:
        module = self._around.get_submodule(self._rest)
        if self._is_before:
            self._handle = module.register_forward_pre_hook(self._hook, prepend=True)
        else:
            self._handle = module.register_forward_hook(self._hook)

    def _look_after(self, module: nn.Module, args: Any) -> None:
        if not (torch.compiler.is_compiling() or self.is_outermost()):
            self._handle.remove()
            self._put()
