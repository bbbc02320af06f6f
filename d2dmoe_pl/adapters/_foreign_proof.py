"""The proof that an adapter from outside of the package takes a model's FFNs for what they are."""

from collections.abc import Iterator, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._adapter import Adapter
from d2dmoe_pl.adapters._ffn import FFN, AnyLinear, holder_of
from d2dmoe_pl.adapters._unchanged import unchanged
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import first_given, hooked
from d2dmoe_pl.sharded_tensors import is_sharded

PROVED = "_d2dmoe_proved"  # attribute of a model
LENGTH = 6  # of texts


def check_foreign(adapter: Adapter, model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Raise ``ConfigError`` if what an adapter from outside gives for FFNs are none, or none of the model's."""
    family, modules = adapter.family, dict(model.named_modules())
    check(
        isinstance(ffns, Sequence) and all(isinstance(ffn, FFN) for ffn in ffns),
        f"family={family!r}: its adapter gives {type(ffns).__name__} for ffns; must be a list of FFN",
    )
    for ffn in ffns:
        for name, linear in {"up": ffn.up, "gate_proj": ffn.gate_proj or ffn.up, "down": ffn.down}.items():
            check(
                isinstance(linear, AnyLinear),
                f"family={family!r}: its adapter gives {type(linear).__name__} for the {name} of {ffn.name}; must be "
                "the nn.Linear itself, or a TransposedLinear or LinearRows of it",
            )
        for name in ("activation", "hidden_dropout", "output_dropout"):
            part = getattr(ffn, name)
            check(
                isinstance(part, nn.Module),
                f"family={family!r}: its adapter gives {type(part).__name__} for the {name} of {ffn.name}; must be a "
                "module",
            )
        inside = {id(module) for module in modules[ffn.name].modules()} if ffn.name in modules else set()
        check(
            not inside.isdisjoint((id(holder_of(ffn.up)), id(holder_of(ffn.down)))),
            f"family={family!r}: its adapter calls an FFN {ffn.name}; must be the path of the module to be replaced, "
            "with its up or down in it",
        )
        gate = None if ffn.gate_proj is None else tuple(ffn.gate_proj.weight.shape)
        up, down = tuple(ffn.up.weight.shape), tuple(ffn.down.weight.shape)
        check(
            gate in (None, up) and down[1] == ffn.d_ff,
            f"family={family!r}: its adapter has for {ffn.name} up {up}, gate_proj {gate} and down {down}; must be "
            "weights (d_ff, d_model), the same or None, and (d_model, d_ff)",
        )


def prove_foreign(adapter: Adapter, model: nn.Module, ffns: Sequence[FFN], is_known: bool = False) -> None:
    """Raise ``ConfigError`` unless ``ffns`` compute what the model does, by one call with a few random tokens.

    Each is proved once, and again with another activation. Where weights have no values here, nothing can be.

    Args:
        adapter: From outside of the package, whose own are held to this by tests.
        model: Of its family.
        ffns: Those that ``adapter`` finds in it, as :func:`check_foreign` has checked them.
        is_known: Whether the adapter is the package's own, and parts of the model are from elsewhere instead.
    """
    proved: set[tuple[str, str]] = model.__dict__.setdefault(PROVED, set())
    new = [ffn for ffn in ffns if (ffn.name, ffn.activation_name) not in proved]
    if not new or is_sharded(model) or any(tensor.is_meta for tensor in model.parameters()):
        return
    errors: dict[str, float] = {}
    unproved = ""
    try:
        _run(adapter, model, new, errors)
    except Exception as error:  # whatever a model raises, such as one whose kernels are for another device
        errors.clear()
        unproved = f", since the model cannot be called here: {(str(error).strip() or repr(error)).splitlines()[0]}"
    tolerance = 1e-4 if new[0].up.weight.dtype in (torch.float32, torch.float64) else 5e-2
    for name, apart in errors.items():
        check(
            apart <= tolerance or not is_known,
            f"{name}: has code of its own, and computes something else than an FFN of family {adapter.family!r} does "
            f"({apart:.2g} apart on random input); must be left out by filter_fn, or do the same as the family's",
        )
        check(
            apart <= tolerance,
            f"family={adapter.family!r}: its adapter takes {name} for something else than the model computes "
            f"({apart:.2g} apart on random input); must be down(activation(up(x))), or of a gated FFN "
            "down(activation(gate_proj(x)) * up(x)), all that the module of that name computes",
        )
    proved.update((ffn.name, ffn.activation_name) for ffn in new)
    unseen = [ffn.name for ffn in new if ffn.name not in errors]
    if unseen:
        say = resolve_name("d2dmoe_pl.notices:notice")  # which brings Lightning, for what is said seldom
        say(
            f"family={adapter.family!r}: {len(unseen)} FFNs are not proved, the first "
            f"{unseen[0]}{unproved or ', which random input does not reach as its adapter says'}"
        )


@torch.no_grad()
def _run(adapter: Adapter, model: nn.Module, ffns: Sequence[FFN], errors: dict[str, float]) -> None:
    """Call the model, and leave in ``errors`` by name how far each FFN that runs is from what it is taken for."""

    def handles() -> Iterator[RemovableHandle]:
        for ffn in ffns:
            beside = _Beside(ffn, errors)
            up, down, named = holder_of(ffn.up), holder_of(ffn.down), model.get_submodule(ffn.name)
            inside = {id(module) for module in named.modules()}
            begin = named if id(up) in inside else up
            beside.is_whole = {id(up), id(down)} <= inside
            yield begin.register_forward_pre_hook(beside.see, with_kwargs=True)
            yield (named if beside.is_whole else down).register_forward_hook(beside.compare)

    with torch.random.fork_rng(devices=[]), unchanged(model):  # what is drawn is none of a training's
        model.eval()
        positions = adapter.num_positions(model)
        inputs = adapter.random_inputs(model, 2, LENGTH if positions is None else min(LENGTH, positions))
        like = ffns[0].up.weight
        batch = {
            name: value.to(like.device, like.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        with hooked(handles()):
            adapter.logits(model, batch)


class _Beside:
    """An FFN computed as what it is taken for, beside the model's own computation, which goes on as it is."""

    def __init__(self, ffn: FFN, errors: dict[str, float]) -> None:
        self._ffn = ffn
        self._errors = errors
        self._x: Any = None
        self.is_whole = False  # what is compared is the output of a module with all of the FFN in it

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of what is given the FFN's input."""
        self._x = first_given(args, kwargs)

    def compare(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of what gives the FFN's output."""
        x, self._x = self._x, None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return
        error = _apart(self._ffn, x, output, self.is_whole)
        self._errors[self._ffn.name] = max(self._errors.get(self._ffn.name, 0.0), error)


def _apart(ffn: FFN, x: Tensor, output: Tensor, is_whole: bool) -> float:
    """How far ``output`` is from what the FFN is taken for, as a share of its largest number."""
    linear = nn.functional.linear
    if x.shape[-1] != ffn.d_model or output.shape[-1] != ffn.down.weight.shape[0]:
        return float("inf")
    up = linear(x, ffn.up.weight, ffn.up.bias)
    if ffn.gate_proj is None:
        hidden = ffn.activation(up)
    else:
        hidden = ffn.activation(linear(x, ffn.gate_proj.weight, ffn.gate_proj.bias)) * up
    expected = linear(_dropped(hidden, ffn.hidden_dropout), ffn.down.weight, ffn.down.bias)
    expected = _dropped(expected, ffn.output_dropout) if is_whole else expected
    if expected.shape != output.shape:
        return float("inf")
    if not bool(output.isfinite().all()):
        return 0.0  # of weights without values yet, or too large for their type
    return float((expected - output).abs().max() / output.abs().max().clamp(min=1e-6))


def _dropped(values: Tensor, dropout: nn.Module) -> Tensor:
    """What a dropout gives in evaluation mode, which one that is not of the model need not be in."""
    given: Tensor = values if isinstance(dropout, nn.Dropout) else dropout(values)
    return given
