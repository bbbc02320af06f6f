"""FFNs of models that no family describes: found by tracing a call, and proved before anything is replaced."""

import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._adapter import Adapter
from d2dmoe_pl.adapters._ffn import FFN, AnyLinear, LinearRows
from d2dmoe_pl.adapters._ffn_sites import Site, find_sites
from d2dmoe_pl.adapters._ffn_tracing import Trace, trace, unchanged
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import hooked

FOUND = "_d2dmoe_sites"  # attribute of a model
LENGTH = 6  # of texts to trace with; no divisor or multiple of anything common
SHOWN = 3


class StructuralAdapter(Adapter):
    """Asked last, of models that no other adapter knows. What it finds is kept on the model."""

    tells_hidden_states = False  # what a model calls so need not be one a token

    @abstractmethod
    def example(self, model: nn.Module) -> Mapping[str, Tensor]:
        """A batch to call the model with, two texts or pictures."""

    def ffns(self, model: Any) -> list[FFN]:
        """See :meth:`Adapter.ffns`.

        Raises:
            ConfigError: If none is found, or what is found is not what the model computes.
        """
        modules = dict(model.named_modules())
        return [
            self._ffn(site, modules)
            for site in self._sites(model)
            if all(self.as_linear(modules.get(path)) is not None for path in site.linear)
        ]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        site = self._site(model, ffn.name)
        if site.form == "layer":
            for path in (site.activation_path, site.down, *site.hidden_dropouts):
                model.set_submodule(path, nn.Identity())
        if site.form == "handed over":
            handed = HandedOver(len(ffn.input_weight) if site.up_rows is None else 2 * ffn.d_ff)
            for path in dict.fromkeys((site.gate or site.up, site.up)):
                model.set_submodule(path, handed)
            module.register_forward_pre_hook(handed.hand_over)
        model.set_submodule(ffn.name, module)

    def taken_back_(self, model: Any, name: str) -> None:
        site = self._site(model, name)
        if site.form == "layer":
            for path, p in zip(site.hidden_dropouts, site.dropout_rates, strict=True):
                model.set_submodule(path, nn.Dropout(p))

    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        """Replace the activation of one FFN, whether it is a module of the model or not."""
        site = self._site(model, ffn.name)
        if site.activation_path is not None:
            model.set_submodule(site.activation_path, activation)
        else:
            assert site.outside is not None
            site.outside.activation = activation

    def _site(self, model: Any, name: str) -> Site:
        return next(site for site in self._sites(model) if site.name == name)

    def _sites(self, model: Any) -> list[Site]:
        found: list[Site] | None = model.__dict__.get(FOUND)
        if found is None:
            found = self._find(model)
            model.__dict__[FOUND] = found
        return found

    def _find(self, model: Any) -> list[Site]:
        was_training = model.training
        model.eval()
        try:
            inputs = self.example(model)
            linear = {name: module for name, module in model.named_modules() if self.as_linear(module) is not None}
            with unchanged(model):
                sites, reasons = self._traced(model, linear, inputs)
            modules = dict(model.named_modules())
            for site in sites:
                site.dropout_rates = [modules[path].p for path in site.hidden_dropouts]
                if site.activation_path is None:
                    assert site.activation is not None
                    site.outside = OutsideActivation(site, site.activation)
                    site.outside.install(model)
            if not any(parameter.is_meta for parameter in model.parameters()):
                with unchanged(model):
                    self._prove(model, sites, inputs)
                left = "" if not reasons else f" (left alone: {_said(reasons)})"
                say = resolve_name("d2dmoe_pl.notices:notice")  # which brings Lightning, for what is said seldom
                say(
                    f"{type(model).__name__}: no adapter knows it; {len(sites)} FFNs found by tracing and proved on "
                    f"random input, the first {sites[0].name}{left}."
                )
        finally:
            model.train(was_training)
        return sites

    def _traced(
        self, model: Any, linear: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]
    ) -> tuple[list[Site], dict[str, str]]:
        name = type(model).__name__
        try:
            traced = self._trace(model, linear, inputs)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{name}: no adapter knows it, and it cannot be traced: {reason}") from error
        sites, reasons = find_sites(model, traced)
        shapes = [tuple(ids.shape) for key, ids in inputs.items() if key.endswith("input_ids")]
        for site in list(sites):
            if shapes and site.shape[:-1] not in shapes:
                sites.remove(site)
                reasons[site.down] = f"sees positions {site.shape[:-1]}, none of {shapes}, so that padding is not known"
        check(
            bool(sites),
            f"{name}: no adapter knows it, and tracing found no FFN of two linear modules with an activation between"
            + (f"; seen: {_said(reasons)}" if reasons else ""),
        )
        return sites, reasons

    def _trace(self, model: Any, linear: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> Trace:
        try:
            return trace(model, linear, inputs, self.logits)
        except Exception:
            if not any(parameter.is_meta for parameter in model.parameters()):
                raise
        with torch.device("cpu"):  # what it computes with, and not only its shapes, decides what it does
            twin: Any = self.rebuild(model).eval()
            inputs = self.example(twin)
        return trace(twin, {name: twin.get_submodule(name) for name in linear}, inputs, self.logits)

    def _ffn(self, site: Site, modules: Mapping[str, nn.Module]) -> FFN:
        def part(path: str, rows: slice | None) -> AnyLinear:
            linear = self.as_linear(modules[path])
            assert linear is not None
            if rows is None:
                return linear
            check(isinstance(linear, nn.Linear), f"{path}: a fused module must be an nn.Linear to be taken apart")
            assert isinstance(linear, nn.Linear)
            return LinearRows(linear, rows)

        activation = site.outside.activation if site.activation_path is None and site.outside else None
        hidden, output = ([modules[path] for path in paths] for paths in (site.hidden_dropouts, site.output_dropouts))
        return FFN(
            name=site.name,
            up=part(site.up, site.up_rows),
            activation=activation or modules[str(site.activation_path)],
            down=part(site.down, None),
            gate_proj=None if site.gate is None else part(site.gate, site.gate_rows),
            hidden_dropout=hidden[0] if len(hidden) == 1 else nn.Sequential(*hidden),
            output_dropout=output[0] if len(output) == 1 else nn.Sequential(*output),
        )

    @torch.no_grad()
    def _prove(self, model: Any, sites: Sequence[Site], inputs: Mapping[str, Tensor]) -> None:
        """Raise ``ConfigError`` unless the model gives the same with FFNs computed as what they are taken for."""
        parameter = next(model.parameters())
        given = {
            key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        expected = self.logits(model, given)
        modules = dict(model.named_modules())
        ran: set[str] = set()

        def handles() -> Iterator[RemovableHandle]:
            for site in sites:
                canonical = Canonical(self._ffn(site, modules), ran)
                yield modules[site.up].register_forward_pre_hook(canonical.see)
                yield modules[site.name if site.form == "module" else site.down].register_forward_hook(canonical.give)

        with hooked(handles()):
            got = self.logits(model, given)
        error = float((got - expected).float().abs().max() / expected.float().abs().max().clamp(min=1e-6))
        tolerance = 1e-3 if parameter.dtype == torch.float32 else 5e-2
        check(
            len(ran) == len(sites) and error <= tolerance,
            f"{type(model).__name__}: no adapter knows it, and with the FFNs that tracing found, e.g. {sites[0].name}, "
            f"it computes something else ({error:.2g} apart)",
        )


class Canonical:
    """An FFN computed as what it is taken for, beside the model's own computation.

    Args:
        ffn: The FFN.
        ran: Gets its name when it has run.
    """

    def __init__(self, ffn: FFN, ran: set[str]) -> None:
        self.ffn = ffn
        self.ran = ran
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
        self.ran.add(ffn.name)
        return linear(hidden, ffn.down.weight, ffn.down.bias).view_as(output)


class HandedOver(nn.Module):
    """Stands for the first products of an FFN that is computed where its last one was: gives zeros, and hands over.

    Args:
        width: Of the zeros.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._given: dict[int, Tensor] = {}  # by thread

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to zeros ``(..., width)``."""
        self._given[threading.get_ident()] = x
        return x.new_zeros(*x.shape[:-1], self.width)

    def hand_over(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """A forward pre-hook of what computes the FFN: gives it the FFN's input."""
        return (self._given.pop(threading.get_ident()),)


class OutsideActivation:
    """An activation that a model computes outside of any module of its own, made one that can be watched and replaced.

    Args:
        site: The FFN.
        activation: What is computed.
    """

    def __init__(self, site: Site, activation: nn.Module) -> None:
        self.site = site
        self.activation = activation
        self._dropouts: list[nn.Module] = []
        self._given: dict[tuple[int, str], Tensor] = {}

    def install(self, model: nn.Module) -> None:
        """Have ``model`` call it."""
        for part, path in (("gate", self.site.gate), ("up", self.site.up)):
            if path is not None:
                model.get_submodule(path).register_forward_hook(partial(self.keep, part))
        self._dropouts = [model.get_submodule(path) for path in self.site.hidden_dropouts]
        model.get_submodule(self.site.down).register_forward_pre_hook(self.apply)

    def keep(self, part: str, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook of the linear modules before: keeps what one gave."""
        self._given[threading.get_ident(), part] = output

    def apply(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """A forward pre-hook of the linear module down: gives it what the activation makes of what was kept."""
        site, thread = self.site, threading.get_ident()
        up = self._given.pop((thread, "up"))
        gate = self._given.pop((thread, "gate"), up)
        up, gate = (
            whole if rows is None else whole[..., rows] for whole, rows in ((up, site.up_rows), (gate, site.gate_rows))
        )
        hidden = self.activation(up) if site.gate is None else self.activation(gate) * up
        for dropout in self._dropouts:
            hidden = dropout(hidden)
        return (hidden,)


def _said(reasons: Mapping[str, str]) -> str:
    """The first reasons, in a line."""
    first = [f"{name} {reason}" for name, reason in list(reasons.items())[:SHOWN]]
    return "; ".join(first) + (f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else "")
