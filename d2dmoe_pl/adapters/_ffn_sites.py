"""Which parts of a traced model are FFNs, and how each can be replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from d2dmoe_pl.adapters._ffn_nodes import (
    ELEMENTWISE,
    HALVES,
    Node,
    aten,
    between,
    made_of,
    without_reshaping,
    without_views,
)
from d2dmoe_pl.adapters._ffn_tracing import Call, Dropped, Trace
from d2dmoe_pl.adapters._recomputed import is_in_place, recomputed
from d2dmoe_pl.adapters._seen_dropout import PLAIN

FUSED = (nn.TransformerEncoderLayer,)  # what computes its FFN, when it is not trained, without calling any part


@dataclass
class Site:
    """An FFN that was found.

    Attributes:
        shape: Of what it was given.
        name: Dotted path of the module that a MoE layer replaces.
        form: A ``module`` of its own; parts among those of a ``layer``, which become Identities; or parts with other
            computations between them, so that what the first is given has to be ``handed over`` to the last.
        up: Path of the linear module up, or of the one that gives gate and up.
        down: Path of the linear module down.
        gate: Path of the gate's linear module; None without a gate.
        up_rows: Which outputs of ``up`` are the FFN's; None for all.
        gate_rows: The same of ``gate``.
        activation_path: Of the activation's module; None where it is no module, or not one of its own.
        activation: Then, what computes the same.
        hidden_dropouts: Paths of dropouts before ``down``.
        hidden_rates: Rates of those that are a function's.
        output_dropouts: Paths of those behind it, in a module of its own.
        output_rates: Rates of those that are a function's.
        is_any_width: Whether what is between the products does the same to any number of neurons.
        changes_up: Whether what ``up`` or ``gate`` gave is changed in place.
        dropout_rates: Of ``hidden_dropouts``.
        outside: Can have the model call ``activation``.
    """

    shape: tuple[int, ...]
    name: str
    form: Literal["module", "layer", "handed over"]
    up: str
    down: str
    gate: str | None
    up_rows: slice | None
    gate_rows: slice | None
    activation_path: str | None
    activation: nn.Module | None
    hidden_dropouts: list[str]
    hidden_rates: list[float]
    output_dropouts: list[str]
    output_rates: list[float]
    is_any_width: bool
    changes_up: bool
    dropout_rates: list[float] = field(default_factory=list)
    outside: Any = None

    @property
    def linear(self) -> list[str]:
        """Paths of all its linear modules."""
        return list(dict.fromkeys(path for path in (self.up, self.gate, self.down) if path is not None))


def find_sites(model: nn.Module, trace: Trace) -> tuple[list[Site], dict[str, str]]:
    """The FFNs of a traced model, first to last; and by name why linear modules behind others end none."""
    sites: list[Site] = []
    reasons: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, calls in trace.linear.items():
        found = made_of(calls[0].given)
        if not found:
            continue
        site = _site(name, calls[0], found, trace, modules)
        if isinstance(site, Site):
            sites.append(site)
        else:
            reasons[name] = site
    taken = [path for site in sites for path in site.linear]
    for site in list(sites):
        if any(taken.count(path) > 1 for path in site.linear):
            sites.remove(site)
            reasons[site.down] = "shares a linear module with another FFN"
    return sites, reasons


def _site(name: str, call: Call, sources: set[Node], trace: Trace, modules: Mapping[str, nn.Module]) -> Site | str:
    """The FFN that ends in a call of the linear module ``name``, or why it is none."""
    products = _products(call.given, sources)
    if isinstance(products, str):
        return products
    up, gate = str(products.up.op), None if products.gate is None else str(products.gate.op)
    linear = list(dict.fromkeys(path for path in (up, gate, name) if path is not None))
    inside = {*between(call.given, sources), *sources}
    if any(user not in inside and user.op != name for node in inside for user in node.used_by):
        return "what comes before it is used elsewhere as well"
    foreign = [path for path in linear if path in trace.used_elsewhere]
    if foreign:
        return f"the weights of {foreign[0]} are used without calling it, as by a fused kernel, or where they are tied"
    if len({len(trace.linear[path]) for path in linear}) > 1:
        return "its parts are not called equally often"
    inputs = {without_views(source.inputs[0]) for source in sources}
    if len(inputs) > 1:
        return "gate and up are given different things"
    (x,) = inputs
    kernels = [path for path, module in modules.items() if isinstance(module, FUSED) and name.startswith(f"{path}.")]
    if kernels or isinstance(modules[""], FUSED):
        return "is run by a fused kernel of torch's TransformerEncoderLayer"
    if not x.is_of_input:
        return "is computed of no input"
    if x.shape[-1:] != call.gave.shape[-1:]:
        return "gives another width than it takes"
    pre, post = products.pre, products.post
    called = [
        each.name
        for each in trace.calls
        if each.name not in linear and without_views(each.given) is pre and without_views(each.gave) is post
    ]
    path = called[0] if called and _is_own(called[0], trace, name) else None
    own = _own_module(x, call.gave, linear, trace, modules)
    behind = all(without_views(node) is post for node in between(call.given, {post}))  # nothing but views and dropout
    hidden = [each for each in trace.dropouts if each.node in inside]
    output = [
        each
        for each in trace.dropouts
        if own is not None
        and (each.owner == own or each.owner.startswith(f"{own}."))
        and without_views(each.node) is without_views(call.gave)
    ]
    early = {pre, *between(post, {pre})} - {post}
    drops = [each for each in (*hidden, *output) if each.p > 0]
    if any(without_views(each.node) in early for each in drops):
        return "is dropped from before its activation"
    if other := [each.kind for each in drops if each.kind != PLAIN]:
        return f"is dropped from by {other[0]}"
    # what drops as a function stays where it is, and must meet nothing there
    are_own = all(_is_own(each, trace, name) for each in _modules(hidden))  # and drop nothing elsewhere
    is_plain = path is not None and gate is None and behind and are_own and not _rates(hidden)
    return Site(
        shape=without_reshaping(x).shape,
        name=own if own is not None else up if is_plain else name,
        form="module" if own is not None else "layer" if is_plain else "handed over",
        up=up,
        down=name,
        gate=gate,
        up_rows=products.up_rows,
        gate_rows=products.gate_rows,
        activation_path=path,
        activation=None if path is not None else recomputed(pre, post),
        hidden_dropouts=_modules(hidden),
        hidden_rates=_rates(hidden),
        output_dropouts=_modules(output),
        output_rates=_rates(output),
        is_any_width=gate is None and all(node.packet in ELEMENTWISE for node in between(call.given, sources)),
        changes_up=any(is_in_place(node) for node in between(call.given, sources)),
    )


def _modules(dropouts: Sequence[Dropped]) -> list[str]:
    """Paths of the modules among them."""
    return list(dict.fromkeys(each.owner for each in dropouts if each.is_module))


def _rates(dropouts: Sequence[Dropped]) -> list[float]:
    """Rates of the functions among them."""
    return [each.p for each in dropouts if not each.is_module and each.p > 0]


@dataclass
class _Products:
    """What the activation takes and gives, and the outputs of linear modules that it and its factor are.

    Attributes:
        up: Output of the linear module up; ``up_rows`` which of it, None for all.
        gate: Output of the gate's; None without a gate. ``gate_rows`` as of ``up``.
        pre: What the activation takes.
        post: What it gives.
    """

    up: Node
    up_rows: slice | None
    gate: Node | None
    gate_rows: slice | None
    pre: Node
    post: Node


def _products(hidden: Node, sources: set[Node]) -> _Products | str:
    """How ``hidden`` is made of the outputs ``sources`` of linear modules; or why that is not how FFNs do it."""
    top = without_views(hidden)
    pieces: dict[Node, slice | None] = dict.fromkeys(sources)
    halves = [node for node in between(hidden, sources) if node.packet in HALVES]
    if halves:
        pieces = {node: _rows(node) for node in halves}
        if None in pieces.values():
            return "a linear module's output is parted along another dimension than the last"
    if len(pieces) == 1 and not halves:
        (source,) = sources
        if top is source:
            return "nothing is between two linear modules"
        return _Products(source, None, None, None, source, top)
    if len(pieces) != 2 or top.packet not in (aten.mul, aten.mul_) or len(top.nodes()) != 2:
        return "is neither one product, nor one times the activation of another"
    sides = [without_views(side) for side in top.nodes()]
    bare = [side for side in sides if side in pieces]
    if len(bare) != 1:
        return "both factors, or none, are as a linear module gave them"
    (up,) = bare
    (post,) = [side for side in sides if side is not up]
    (pre,) = [piece for piece in pieces if piece is not up]
    if up in {node for each in (post, *between(post, {pre})) for node in each.nodes()}:
        return "both factors are of one linear module's output"

    def source_of(piece: Node) -> Node:
        return without_views(piece.nodes()[0]) if halves else piece

    return _Products(source_of(up), pieces[up], source_of(pre), pieces[pre], pre, post)


def _rows(node: Node) -> slice | None:
    """Which of the last dimension a part of a tensor is; None if it is of another dimension."""
    given, _ = node.inputs
    whole = given[0].shape
    if node.packet is aten.slice:
        rest: tuple[Any, ...] = (0, 0, None, 1)
        dim, start, end, step = (*given[1:5], *rest[len(given) - 1 :])[:4]
        is_last = dim in (-1, len(whole) - 1)
        return slice(start or 0, min(end or whole[-1], whole[-1]), step) if is_last else None
    _, sizes, *dims = given
    if not dims or dims[0] not in (-1, len(whole) - 1) or node.part is None:
        return None
    widths = [sizes] * (-(-whole[-1] // sizes)) if isinstance(sizes, int) else list(sizes)
    start = sum(widths[: node.part])
    return slice(start, start + widths[node.part])


def _is_own(name: str, trace: Trace, down: str) -> bool:
    """Whether the module ``name`` runs only as often as the linear module ``down`` does."""
    return sum(call.name == name for call in trace.calls) == len(trace.linear[down])


def _own_module(
    x: Node, output: Node, linear: Sequence[str], trace: Trace, modules: Mapping[str, nn.Module]
) -> str | None:
    """Path of the innermost module that takes ``x``, gives ``output`` and has the weights of ``linear`` alone."""
    weights = {id(parameter) for path in linear for parameter in modules[path].parameters()}
    for call in trace.calls:
        is_it = without_views(call.given) is x and without_views(call.gave) is without_views(output)
        if call.name and is_it and {id(parameter) for parameter in modules[call.name].parameters()} == weights:
            return call.name
    return None
