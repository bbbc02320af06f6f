"""Whether what a model computes beside its weights is what its description says: activations, epsilons, pooling."""

import copy

import torch
from torch import Tensor, nn

from d2dmoe_pl.errors import check

SETTINGS = ("eps", "epsilon", "variance_epsilon", "global_pool", "pool_type")
"""Attributes of libraries' modules that change what these compute."""


def check_same_parts(made: nn.Module, model: nn.Module) -> None:
    """Raise ``ConfigError`` where a part of ``model`` computes otherwise than that of ``made`` with the same weights.

    What was put there by hand, as another activation, is in no description, and would be gone without a word.

    Args:
        made: By the description, on the meta device.
        model: That is to be saved, with modules of the same names.
    """
    parts = dict(model.named_modules())
    kind = type(model).__name__
    for name, meant in made.named_modules():
        there = parts.get(name)
        if there is None:
            continue
        for setting in SETTINGS:
            one, other = (getattr(each, setting, None) for each in (meant, there))
            where = f"{kind}: {name}{'.' if name else ''}{setting} is {other!r}"
            check(
                not isinstance(one, float | str) or one == other,
                f"{where}, where one made by its config has {one!r}, so that it could not be loaded; change the "
                "config, or keep the state_dict",
            )
        check(
            _computes_the_same(meant, there),
            f"{kind}: {name} is {there}, where one made by its config has {meant}, so that it could not be loaded; "
            "change the config, by swap_activation_ for FFNs, or keep the state_dict",
        )


def _computes_the_same(meant: nn.Module, there: nn.Module) -> bool:
    """Whether two modules do, of which those with tensors or others in them are compared elsewhere."""
    for module in (meant, there):
        if any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
            return True
    if type(meant) is type(there) and repr(meant) == repr(there):
        return True
    one, other = _values(meant), _values(there)
    return one is None or other is None or (one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-6))


def _values(function: nn.Module) -> Tensor | None:
    """What ``function`` gives of one tensor where it is evaluated; None if it takes another kind of input."""
    points = torch.linspace(-8, 8, 256, device="cpu").view(4, 64)
    try:
        with torch.no_grad():
            values = copy.deepcopy(function).eval()(points)
    except Exception:  # whatever it raises: it is none of one tensor
        return None
    return values if isinstance(values, Tensor) else None
