"""FFNs of models that no family describes: found by tracing a call, and proved before anything is replaced."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters._adapter import Adapter
from d2dmoe_pl.adapters._ffn import FFN, AnyLinear, LinearRows
from d2dmoe_pl.adapters._ffn_proof import prove
from d2dmoe_pl.adapters._ffn_sites import Site, find_sites
from d2dmoe_pl.adapters._ffn_tracing import Trace, trace
from d2dmoe_pl.adapters._handed_over import HandedOver, Silent
from d2dmoe_pl.adapters._outside_activation import OutsideActivation
from d2dmoe_pl.adapters._unchanged import nothing_silent, unchanged
from d2dmoe_pl.errors import ConfigError, check

FOUND = "_d2dmoe_sites"  # attribute of a model
PROVED = "_d2dmoe_sites_proved"  # attribute of one whose weights were there when they were found
LENGTH = 6  # of texts to trace with; no divisor or multiple of anything common
SHOWN = 3


class StructuralAdapter(Adapter):
    """Asked last, of models that no other adapter knows. What it finds is kept on the model."""

    tells_hidden_states = False  # what a model calls so need not be one a token
    takes_other_positions = False  # FFNs of a model that gives none of its FFNs the positions of its texts

    @abstractmethod
    def examples(self, model: nn.Module) -> Sequence[Mapping[str, Tensor]]:
        """Batches to call the model with: one to trace, and others, of other values and sizes, to prove it on."""

    def ffns(self, model: Any) -> list[FFN]:
        """See :meth:`Adapter.ffns`.

        Raises:
            ConfigError: If none is found, or what is found is not what the model computes.
        """
        modules = dict(model.named_modules())
        return [self._ffn(site, model, modules) for site in self._sites(model) if self._are_dense(modules, [site])]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        self._put_(model, self._site(model, ffn.name), ffn, module)

    @staticmethod
    def _put_(model: Any, site: Site, ffn: FFN, module: nn.Module) -> None:
        if site.outside is not None:
            site.outside.remove()
        if site.form == "layer":
            for path in (site.activation_path, site.down, *site.hidden_dropouts):
                model.set_submodule(path, nn.Identity())
        if site.form == "handed over":
            whole = ffn.d_ff if site.up_rows is None else 2 * ffn.d_ff
            handed = HandedOver(1 if site.is_any_width else whole, ffn.up.weight.dtype)
            for path in dict.fromkeys((site.gate or site.up, site.up)):
                model.set_submodule(path, handed)
            module.register_forward_pre_hook(handed.hand_over)
        model.set_submodule(ffn.name, module)

    def taken_back_(self, model: Any, name: str) -> None:
        site = self._site(model, name)
        if site.form == "layer":
            for path, p in zip(site.hidden_dropouts, site.dropout_rates, strict=True):
                model.set_submodule(path, nn.Dropout(p))
        if site.outside is not None:
            site.outside.take_back(model)

    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        """Replace the activation of one FFN, whether it is a module of the model or not."""
        site = self._site(model, ffn.name)
        if site.activation_path is not None:
            model.set_submodule(site.activation_path, activation)
        else:
            assert site.outside is not None
            site.outside.replace(model, activation)

    def _site(self, model: Any, name: str) -> Site:
        return next(site for site in self._sites(model) if site.name == name)

    def _sites(self, model: Any) -> list[Site]:
        found: list[Site] | None = model.__dict__.get(FOUND)
        is_here = not any(parameter.is_meta for parameter in model.parameters())
        if found is None or (is_here and not model.__dict__.get(PROVED) and self.is_dense(model, found)):
            found = self._find(model)
            model.__dict__[FOUND], model.__dict__[PROVED] = found, is_here
        return found

    def is_dense(self, model: Any, sites: Sequence[Site]) -> bool:
        """Whether nothing has been put in the place of any of ``sites``, nor of its activation outside of modules."""
        is_replaced = any(site.outside is not None and site.outside.is_replaced for site in sites)
        return not is_replaced and self._are_dense(dict(model.named_modules()), sites)

    def _are_dense(self, modules: Mapping[str, nn.Module], sites: Sequence[Site]) -> bool:
        return all(self.as_linear(modules.get(path)) is not None for site in sites for path in site.linear)

    def _find(self, model: Any) -> list[Site]:
        with unchanged(model):
            model.eval()
            with _told(model, but=ConfigError):
                examples = [fitting(example, model) for example in self.examples(model)]
            linear = {name: module for name, module in model.named_modules() if self.as_linear(module) is not None}
            sites, reasons = self._traced(model, linear, examples[0])
            modules = dict(model.named_modules())
            for site in sites:
                site.dropout_rates = [modules[path].p for path in site.hidden_dropouts]
                if site.activation is not None:
                    site.outside = OutsideActivation(site, site.activation)
            if not any(parameter.is_meta for parameter in model.parameters()):
                self._prove(model, sites, examples)
                self._try_out(model, sites, examples[0])
                left = "" if not reasons else f" (left alone: {_said(reasons)})"
                say = resolve_name("d2dmoe_pl.notices:notice")  # which brings Lightning, for what is said seldom
                say(
                    f"{type(model).__name__}: no adapter knows it; {len(sites)} FFNs found by tracing and proved on "
                    f"random input, the first {sites[0].name}{left}."
                )
        return sites

    def _prove(self, model: Any, sites: Sequence[Site], examples: Sequence[Mapping[str, Tensor]]) -> None:
        modules = dict(model.named_modules())
        with nothing_silent(model):
            prove(model, sites, [self._ffn(site, model, modules) for site in sites], examples, self.logits)

    @torch.no_grad()
    def _try_out(self, model: Any, sites: list[Site], example: Mapping[str, Tensor]) -> None:
        """Call the model with something else in the place of its FFNs, as experts will be, and take that away again.

        Where what is between an FFN's parts does not take that, these are left in their full width.

        Raises:
            ConfigError: If the model cannot be called so either.
        """
        error = self._failure(model, sites, example)
        if error is not None and any(site.form == "layer" or site.is_any_width for site in sites):
            for site in sites:
                site.is_any_width = False
                if site.form == "layer":
                    site.form, site.name = "handed over", site.down
            error = self._failure(model, sites, example)
        check(
            error is None,
            f"{type(model).__name__}: no adapter knows it, and its FFNs, e.g. {sites[0].name}, cannot be replaced: its "
            f"code looks into their parts ({error})",
        )

    def _failure(self, model: Any, sites: Sequence[Site], example: Mapping[str, Tensor]) -> str | None:
        """What a call says of a model whose FFNs have been replaced; it has them again then."""
        modules = dict(model.named_modules())
        parts = [(site.name, *site.linear, site.activation_path, *site.hidden_dropouts) for site in sites]
        try:
            for site in sites:
                ffn = self._ffn(site, model, modules)
                self._put_(model, site, ffn, Silent(ffn.down.weight.shape[0]))
            self.logits(model, example)
        except Exception as error:  # whatever a model raises
            return (str(error).strip() or repr(error)).splitlines()[0]
        finally:
            for path in dict.fromkeys(path for each in parts for path in each if path is not None):
                model.set_submodule(path, modules[path])
            for site in sites:
                if site.outside is not None:
                    site.outside.take_back(model)
        return None

    def _traced(
        self, model: Any, linear: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]
    ) -> tuple[list[Site], dict[str, str]]:
        name = type(model).__name__
        with _told(model):
            traced = self._trace(model, linear, inputs)
        sites, reasons = find_sites(model, traced)
        shapes = [tuple(ids.shape) for key, ids in inputs.items() if key.endswith("input_ids")]
        elsewhere = [site for site in sites if shapes and site.shape[:-1] not in shapes]
        of_samples = [site for site in elsewhere if len(site.shape) == 3 and site.shape[0] == shapes[0][0]]
        if sites and self.takes_other_positions and len(of_samples) == len(sites):
            return sites, reasons
        for site in elsewhere:
            sites.remove(site)
            reasons[site.down] = f"sees positions {site.shape[:-1]}, none of {shapes}, so that padding is not known"
        check(
            bool(sites),
            f"{name}: no adapter knows it, and tracing found no FFN of two linear modules with an activation between"
            + (f"; seen: {_said(reasons)}" if reasons else ""),
        )
        return sites, reasons

    def _trace(self, model: Any, linear: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> Trace:
        new = self._new(model)
        try:
            return self._trace_as(new, linear)
        except Exception:
            if not any(parameter.is_meta for parameter in model.parameters()):
                if new is model:
                    raise
                return trace(model, linear, inputs, self.logits)
        with torch.device("cpu"):  # what it computes with, and not only its shapes, decides what it does
            return self._trace_as(self.rebuild(model), linear)

    def _trace_as(self, twin: Any, names: Iterable[str]) -> Trace:
        twin.eval()
        inputs = fitting(self.examples(twin)[0], twin)
        return trace(twin, {name: twin.get_submodule(name) for name in names}, inputs, self.logits)

    def _new(self, model: Any) -> Any:
        """``model`` as its config makes it, changed by no call, without weights; itself, if it has other parts."""
        try:
            with torch.device("meta"):
                twin = self.rebuild(model)
        except Exception:  # of a library that cannot make it again, or not without weights; it is then as it is
            return model
        kinds = [{name: type(module) for name, module in each.named_modules()} for each in (model, twin)]
        return twin if kinds[0] == kinds[1] else model

    def _ffn(self, site: Site, model: nn.Module, modules: Mapping[str, nn.Module]) -> FFN:
        def part(path: str, rows: slice | None) -> AnyLinear:
            linear = self.as_linear(modules[path])
            assert linear is not None
            if rows is None:
                return linear
            check(isinstance(linear, nn.Linear), f"{path}: a fused module must be an nn.Linear to be taken apart")
            assert isinstance(linear, nn.Linear)
            return LinearRows(linear, rows)

        outside: OutsideActivation | None = site.outside
        return FFN(
            name=site.name,
            up=part(site.up, site.up_rows),
            activation=modules[str(site.activation_path)] if outside is None else outside.activation,
            down=part(site.down, None),
            gate_proj=None if site.gate is None else part(site.gate, site.gate_rows),
            hidden_dropout=_dropout([modules[path] for path in site.hidden_dropouts], site.hidden_rates),
            output_dropout=_dropout([modules[path] for path in site.output_dropouts], site.output_rates),
            called=tuple if outside is None else partial(outside.called, model),
        )


def fitting(example: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The example where the model is, and in its type."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    like = next((each for each in floating if each.is_meta), floating[0])  # some put one on the CPU whatever is said
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else None)
        for name, value in example.items()
    }


def _dropout(modules: Sequence[Any], rates: Sequence[float]) -> nn.Module:
    """One module that drops as all of them do, one after the other."""
    if len(modules) == 1 and not rates:
        return modules[0]
    kept = math.prod(1 - p for p in (*(module.p for module in modules), *rates))
    return nn.Dropout(1 - kept) if modules or rates else nn.Identity()


def _said(reasons: Mapping[str, str]) -> str:
    """The first reasons, in a line."""
    first = [f"{name} {reason}" for name, reason in list(reasons.items())[:SHOWN]]
    return "; ".join(first) + (f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else "")


@contextmanager
def _told(model: nn.Module, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Raise ``ConfigError`` for whatever a model, or its settings, raise when it is called as others are."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{type(model).__name__}: no adapter knows it, and it cannot be traced: {reason}") from error
