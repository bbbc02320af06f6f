"""Hooks of users on modules that are replaced: nothing would call them any more."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from d2dmoe_pl.adapters import FFN, holder_of
from d2dmoe_pl.errors import check

KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_not_hooked(modules: Mapping[str, nn.Module]) -> None:
    """Raise ``ConfigError`` if one of ``modules``, by name, has a hook: what it changes or sees would be lost."""
    for name, module in modules.items():
        hooks = [hook for kind in KINDS for hook in getattr(module, kind).values()]
        check(
            all(_place(hook).startswith("d2dmoe_pl.") for hook in hooks),  # such as those that stand for an activation
            f"{name}: has hooks, which nothing would call once it is replaced; must be removed before, and registered "
            "on what stands there then",
        )


def _place(hook: Any) -> str:
    """The module that a hook's code is from."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))


def replaced_modules(model: nn.Module, ffns: Sequence[FFN]) -> dict[str, nn.Module]:
    """What is gone once ``ffns`` have experts, by name: their linear layers and what is around these alone."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for ffn in ffns:
        named = model.get_submodule(ffn.name)
        parts = [holder_of(linear) for linear in (ffn.up, ffn.gate_proj, ffn.down) if linear is not None]
        stays = {id(module) for module in ffn.activation.modules()}
        own = {id(parameter) for part in (*parts, ffn.activation) for parameter in part.parameters()}
        is_whole = all(id(parameter) in own for parameter in named.parameters())
        gone = [*(named.modules() if is_whole else ()), *parts]
        found |= {names[id(module)]: module for module in gone if id(module) not in stays}
    return found
