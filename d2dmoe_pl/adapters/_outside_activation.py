"""An activation that a model computes outside of any module of its own, made one that can be watched and replaced."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2dmoe_pl.adapters._ffn_sites import Site
from d2dmoe_pl.adapters._outermost_hook import OutermostHook
from d2dmoe_pl.errors import check


class OutsideActivation:
    """What stands for it. The model is left as it is but while it is watched, and once it is another.

    Args:
        site: The FFN.
        activation: What is computed.
    """

    def __init__(self, site: Site, activation: nn.Module) -> None:
        self.site = site
        self.activation = activation
        self.is_replaced = False
        self._hooks: list[OutermostHook] = []
        self._given: dict[tuple[int, str], Tensor] = {}

    def called(self, model: nn.Module) -> "Iterator[OutsideActivation]":
        """Have ``model`` call it until what is given is removed; nothing where it does so anyway."""
        if not self._hooks:
            self._install(model)
            yield self

    def replace(self, model: nn.Module, activation: nn.Module) -> None:
        """Have ``model`` call ``activation`` from now on."""
        self.activation = activation
        self.is_replaced = True
        if not self._hooks:
            self._install(model)

    def take_back(self, model: nn.Module) -> None:
        """Go on where ``model`` has got modules of a twin, whose hooks came with them."""
        for hook in list(model.get_submodule(self.site.down)._forward_pre_hooks.values()):
            owner = getattr(getattr(hook, "func", None), "__self__", None)
            if isinstance(owner, OutsideActivation):
                owner.remove()
        if self.is_replaced:
            self._install(model)

    def remove(self) -> None:
        """Have the model compute it as it does by itself."""
        while self._hooks:
            self._hooks.pop().remove()

    def _install(self, model: nn.Module) -> None:
        dropouts = [model.get_submodule(path) for path in self.site.hidden_dropouts]
        for part, path in (("up", self.site.up), ("gate", self.site.gate)):
            if path is not None and (part == "up" or path != self.site.up):
                self._hooks.append(OutermostHook(model, path, partial(self.keep, part), is_before=False))
        self._hooks.append(OutermostHook(model, self.site.down, partial(self.apply, dropouts), is_before=True))

    def keep(self, part: str, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook of the linear modules before: keeps what one gave."""
        self._given[threading.get_ident(), part] = output.clone() if self.site.changes_up else output

    def apply(self, dropouts: list[nn.Module], module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """A forward pre-hook of the linear module down: gives it what the activation makes of what was kept.

        Raises:
            ConfigError: If something was put around the linear modules that the hooks could not follow.
        """
        site, thread = self.site, threading.get_ident()
        check(
            torch.compiler.is_compiling() or all(hook.is_outermost() for hook in self._hooks),
            f"{site.down}: something stands around it or {site.up} that came after its activation was replaced, and is "
            "run without calling the module that they are in; put it there first",
        )
        up = self._given.pop((thread, "up"))
        gate = self._given.pop((thread, "gate"), up)
        up, gate = (
            whole if rows is None else whole[..., rows] for whole, rows in ((up, site.up_rows), (gate, site.gate_rows))
        )
        hidden = self.activation(up) if site.gate is None else self.activation(gate) * up
        for dropout in dropouts:
            hidden = dropout(hidden)
        for p in site.hidden_rates:
            hidden = F.dropout(hidden, p, module.training)
        return (hidden,)
