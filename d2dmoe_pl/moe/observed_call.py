"""How a batch becomes a call of a model: by which arguments, and what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.errors import ConfigError, check, one_line, said_of
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.moe.compiled_calls import named_arguments


@dataclass(frozen=True)
class ModelCall:
    """How :meth:`Adapter.logits` calls a model.

    Attributes:
        tensors: By the name of the argument.
        settings: All other arguments that are given: numbers, strings, truth values.
        output: What the model gave.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    output: Any


@torch.no_grad()
def observed_call(model: nn.Module, batch: Mapping[str, Tensor]) -> ModelCall:
    """The call that is made of ``batch``, after making it.

    Raises:
        ConfigError: If the model cannot be called so, is given texts of fewer than two tokens, or gives what is no
            tensor.
    """
    seen: list[tuple[tuple, dict[str, Any], Any]] = []

    def watch(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args, kwargs, output))

    with hooked([model.register_forward_hook(watch, with_kwargs=True)]):
        try:
            adapter_for(model).logits(model, batch)
        except ConfigError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise ConfigError(
                f"batch: {type(model).__name__} cannot be called with {', '.join(batch) or 'nothing'} "
                f"({one_line(str(error))})"
            ) from error
    args, kwargs, output = seen[-1]
    given = {key: value for key, value in named_arguments(model, args, kwargs).items() if value is not None}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        check(
            value.dim() != 2 or value.shape[1] > 1, f"batch: {key} is {said_of(value)}; must be of two tokens or more"
        )
    others = {type(leaf).__name__ for leaf in pytree.tree_leaves(output) if not isinstance(leaf, Tensor)}
    check(
        not others,
        f"{type(model).__name__}: gives {', '.join(sorted(others))} beside tensors; must give tensors alone, to be "
        "compiled ahead of time",
    )
    return ModelCall(tensors, {key: value for key, value in given.items() if key not in tensors}, output)
