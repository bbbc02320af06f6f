"""The canonical view of an attention's linear projections, and how a module is put in the place of one."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters._ffn import TransposedLinear
from d2dmoe_pl.errors import ConfigError, check

Role = Literal["query", "key", "value", "output"]
FUSED: tuple[Role, ...] = ("query", "key", "value")
ROLES: tuple[Role, ...] = (*FUSED, "output")


@dataclass(frozen=True)
class AttentionParts:
    """What a family calls the projections of its attention.

    Attributes:
        classes: Of the modules that hold them.
        output: Path of each projection from such a module.
        query: None, as are ``key`` and ``value``, where one module computes all three.
        key: See ``query``.
        value: See ``query``.
        fused: Path of that module, whose output holds queries, keys and values in this order.
        fused_widths: How wide each of the three is, by the module that holds the projections; equally if not given.
        fused_turns: In how many turns they come, by that module, as many as heads where each head has its three side by
            side; in one if not given.
        replaceable: Which of ``query``, ``key``, ``value``, ``fused`` and ``output``, as they are called here, a module
            that holds projections calls on a layer's input and on nothing else; all that are named if not given.
    """

    classes: tuple[type[nn.Module], ...]
    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    fused_widths: Callable[[Any], tuple[int, int, int]] | None = None
    fused_turns: Callable[[Any], int] | None = None
    replaceable: Callable[[Any], Collection[str]] | None = None

    def paths(self, attention: nn.Module) -> dict[str, str]:
        """The paths of what can be replaced in ``attention``, from it, by what they are called here."""
        named = {name: path for name in ("fused", *ROLES) if (path := getattr(self, name)) is not None}
        able = named if self.replaceable is None else self.replaceable(attention)
        return {name: path for name, path in named.items() if name in able}


@dataclass(frozen=True)
class Projection:
    """One linear map ``d_in -> d_out`` of an attention.

    Attributes:
        name: Dotted path of the module that computes it, once a fused one is taken apart; its name everywhere.
        role: What it gives.
        place: Dotted path of the module that computes it now.
        linear: That module.
        rows: Which of the module's outputs are the projection's, in each turn.
        fused_widths: Of a fused module, how many outputs each of its projections has, in order.
        turns: In how many equal turns a fused module gives all of its projections.
    """

    name: str
    role: Role
    place: str
    linear: nn.Linear | TransposedLinear
    rows: slice = field(default_factory=lambda: slice(None))
    fused_widths: tuple[int, ...] = ()
    turns: int = 1

    def part_of(self, outputs: Tensor) -> Tensor:
        """What the projection gave among the outputs of its module: ``(..., outputs)`` to ``(..., d_out)``."""
        return outputs.unflatten(-1, (self.turns, -1))[..., self.rows].flatten(-2)

    @property
    def weight(self) -> Tensor:
        """``(d_out, d_in)``."""
        return self.part_of(self.linear.weight.t()).t()

    @property
    def bias(self) -> Tensor | None:
        """``(d_out,)``."""
        return None if self.linear.bias is None else self.part_of(self.linear.bias)

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[0]


class SeparateProjections(nn.Module):
    """What stands in the place of a fused module: one module a projection, their outputs side by side.

    Args:
        projections: The modules by what they give.
        turns: In how many equal turns their outputs come.
    """

    def __init__(self, projections: dict[Role, nn.Module], turns: int = 1) -> None:
        super().__init__()
        self.turns = turns
        for role, module in projections.items():
            self.add_module(role, module)

    def parts(self) -> dict[Role, nn.Module]:
        """The modules by what they give."""
        return {role: self.get_submodule(role) for role in FUSED}

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in)`` to ``(..., d_out)``, with ``d_out`` of all three."""
        outputs = [module(x).unflatten(-1, (self.turns, -1)) for module in self.children()]
        return torch.cat(outputs, dim=-1).flatten(-2)  # (..., turns, d_out / turns) to (..., d_out)


AsLinear = Callable[[nn.Module], nn.Linear | TransposedLinear | None]


def plain_linear(module: nn.Module) -> nn.Linear | TransposedLinear | None:
    """``module``, if it is an ``nn.Linear``."""
    return module if isinstance(module, nn.Linear) else None


def find_projections(model: nn.Module, parts: AttentionParts, as_linear: AsLinear = plain_linear) -> list[Projection]:
    """The linear projections of every self-attention, first to last; those that were replaced are not among them.

    Cross-attention is left out: what it attends to is no part of the batch that padding is told by.

    Args:
        model: The model.
        parts: What its family calls the projections.
        as_linear: A module as an ``nn.Linear``; None if it is no linear projection.

    Raises:
        ConfigError: If a fused module cannot be taken apart, or the family calls something what is not there, or two
            projections the same.
    """
    found = []
    for name, attention in model.named_modules():
        if not isinstance(attention, parts.classes) or getattr(attention, "is_cross_attention", False):
            continue
        paths = parts.paths(attention)
        _check_there(attention, name, paths)
        if "fused" in paths:
            widths = None if parts.fused_widths is None else parts.fused_widths(attention)
            turns = 1 if parts.fused_turns is None else parts.fused_turns(attention)
            path = paths["fused"]
            found += _of_fused(attention.get_submodule(path), f"{name}.{path}", as_linear, widths, turns)
        for role in ROLES:
            if role in paths and (linear := as_linear(attention.get_submodule(paths[role]))) is not None:
                found.append(Projection(f"{name}.{paths[role]}", role, f"{name}.{paths[role]}", linear))
    return found


def _check_there(attention: nn.Module, name: str, paths: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` unless each of ``paths`` leads to a module of its own."""
    modules = dict(attention.named_modules(remove_duplicate=False))
    for role, path in paths.items():
        check(
            path in modules, f"{name}: a {type(attention).__name__} has no {path}, which its adapter calls its {role}"
        )
    twice = len(set(paths.values())) < len(paths)
    check(not twice, f"{name}: its adapter calls two projections the same, in {dict(paths)}; must be one each")


def put_projection_(model: nn.Module, projection: Projection, module: nn.Module) -> None:
    """Let ``module``, ``(..., d_in)`` to ``(..., d_out)``, compute what ``projection`` computed."""
    if projection.name != projection.place and not isinstance(
        model.get_submodule(projection.place), SeparateProjections
    ):
        parts = _taken_apart(projection.linear, projection.place, projection.fused_widths, projection.turns)
        separate = SeparateProjections({part.role: _alone(part) for part in parts}, projection.turns)
        model.set_submodule(projection.place, separate)
    model.set_submodule(projection.name, module)


def _of_fused(
    module: nn.Module, name: str, as_linear: AsLinear, widths: tuple[int, int, int] | None, turns: int
) -> list[Projection]:
    if isinstance(module, SeparateProjections):
        parts = {role: as_linear(part) for role, part in module.parts().items()}
        return [
            Projection(f"{name}.{role}", role, f"{name}.{role}", linear)
            for role, linear in parts.items()
            if linear is not None
        ]
    linear = as_linear(module)
    outputs = 0 if linear is None else linear.weight.shape[0]
    if linear is None or (widths is None and outputs % len(FUSED) != 0):
        raise ConfigError(
            f"{name}: a {type(module).__name__} of {outputs} outputs, which cannot be taken apart into the projections "
            "query, key and value; must be one linear module with as many outputs for each"
        )
    return _taken_apart(linear, name, widths or (outputs // len(FUSED),) * len(FUSED), turns)


def _taken_apart(
    linear: nn.Linear | TransposedLinear, name: str, widths: tuple[int, ...], turns: int
) -> list[Projection]:
    in_turn = [width // turns for width in widths]
    return [
        Projection(f"{name}.{role}", role, name, linear, slice(end - width, end), widths, turns)
        for role, width, end in zip(FUSED, in_turn, accumulate(in_turn), strict=True)
    ]


@torch.no_grad()
def _alone(projection: Projection) -> nn.Linear:
    """A module of its own for one of several in a fused module."""
    weight, bias = projection.weight, projection.bias
    linear = nn.Linear(
        projection.d_in, projection.d_out, bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear.requires_grad_(projection.linear.weight.requires_grad)
