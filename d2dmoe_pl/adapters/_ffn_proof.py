"""The proof that a model computes what the FFNs that were found in it are taken for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._ffn_sites import Site
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked


@torch.no_grad()
def prove(
    model: Any,
    sites: Sequence[Site],
    ffns: Sequence[FFN],
    examples: Sequence[Mapping[str, Tensor]],
    call: Callable[[Any, Any], Tensor],
) -> None:
    """Raise ``ConfigError`` unless the model gives the same with FFNs computed as what they are taken for.

    Args:
        model: In evaluation mode, as it computes by itself.
        sites: Of the FFNs.
        ffns: The same FFNs.
        examples: What to call it with; all but the first only if it takes them.
        call: Calls the first with the second.
    """
    _prove_on(model, sites, ffns, examples[0], call(model, examples[0]), call)
    for example in examples[1:]:
        try:
            expected = call(model, example)
        except Exception:  # whatever a model raises that takes no other size
            continue
        _prove_on(model, sites, ffns, example, expected, call)


def _prove_on(
    model: Any,
    sites: Sequence[Site],
    ffns: Sequence[FFN],
    example: Mapping[str, Tensor],
    expected: Tensor,
    call: Callable[[Any, Any], Tensor],
) -> None:
    errors: dict[str, float] = {}

    def handles() -> Iterator[RemovableHandle]:
        for site, ffn in zip(sites, ffns, strict=True):
            canonical = Canonical(ffn, errors)
            end = site.name if site.form == "module" else site.down
            yield model.get_submodule(site.up).register_forward_pre_hook(canonical.see)
            yield model.get_submodule(end).register_forward_hook(canonical.give)

    with hooked(handles()):
        got = call(model, example)
    error = max(_apart(got, expected), *errors.values())  # of the whole, and of each on its own, however little it adds
    tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
    check(
        len(errors) == len(sites) and error <= tolerance,
        f"{type(model).__name__}: no adapter knows it, and with the FFNs that tracing found, e.g. {sites[0].name}, "
        f"it computes something else ({error:.2g} apart)",
    )


def _apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).float().abs().max() / expected.float().abs().max().clamp(min=1e-6))


class Canonical:
    """An FFN computed as what it is taken for, beside the model's own computation.

    Args:
        ffn: The FFN.
        errors: Gets, by its name, how far at most it was off.
    """

    def __init__(self, ffn: FFN, errors: dict[str, float]) -> None:
        self.ffn = ffn
        self.errors = errors
        self._x: Tensor | None = None

    def see(self, module: nn.Module, args: tuple[Tensor]) -> None:
        """A forward pre-hook of what is given the FFN's input."""
        (self._x,) = args

    def give(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A forward hook of what gives the FFN's output."""
        ffn, linear = self.ffn, nn.functional.linear
        assert self._x is not None
        up = linear(self._x, ffn.up.weight, ffn.up.bias)
        if ffn.gate_proj is None:
            hidden = ffn.activation(up)
        else:
            hidden = ffn.activation(linear(self._x, ffn.gate_proj.weight, ffn.gate_proj.bias)) * up
        given = linear(hidden, ffn.down.weight, ffn.down.bias).view_as(output)
        self.errors[ffn.name] = max(self.errors.get(ffn.name, 0.0), _apart(given, output))
        return given
