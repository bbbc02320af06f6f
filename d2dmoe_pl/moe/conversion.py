"""In-place conversion of a model, one stage after the other: experts, routers, gate.

Each function takes ``(model, config, filter_fn)``, checks every place it will touch before it touches the first, and
raises ``ConfigError`` if it finds none.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from d2dmoe_pl.adapters import FFN, adapter_for
from d2dmoe_pl.errors import check, check_kind
from d2dmoe_pl.moe.budgets.budget_path import set_budget_path_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig, CutoffConfigs, Cutoffs
from d2dmoe_pl.moe.experts.experts import Experts, check_assignment
from d2dmoe_pl.moe.find_layers import FilterFn, LayerFilterFn, check_weights_are_here, moe_layers, select_ffns
from d2dmoe_pl.moe.gating import GATING_RULES, Gate, GateConfig, check_tau, takes_k
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.lost_hooks import check_not_hooked, replaced_modules
from d2dmoe_pl.moe.quantization.int8_layers import check_not_quantized
from d2dmoe_pl.moe.routers import RouterConfig, make_router, try_router
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig, make_stand_in
from d2dmoe_pl.moe.token_streams import shared_context_
from d2dmoe_pl.typed_settings import check_types_


@dataclass(frozen=True)
class ExpertsConfig:
    """How an FFN is split.

    Attributes:
        num_experts: ``E``; divides the width of every FFN that is split.
        num_projection_experts: The same for MLPs in the place of attention projections, which are narrower;
            ``num_experts`` if not given.

    Raises:
        ConfigError: If a number is not positive.
    """

    num_experts: int
    num_projection_experts: int | None = None

    def __post_init__(self) -> None:
        check_types_(self)
        for argument, value in asdict(self).items():
            check(value is None or value > 0, f"{argument}={value}: must be positive")

    def num_for(self, ffn: FFN) -> int:
        """How many experts ``ffn`` is split into.

        Raises:
            ConfigError: If its width is not divisible by them.
        """
        argument, number, own = "num_experts", self.num_experts, False
        if ffn.is_projection and self.num_projection_experts is not None:
            argument, number, own = "num_projection_experts", self.num_projection_experts, True
        hint = "; num_projection_experts is for these alone" if ffn.is_projection and not own else ""
        check(
            ffn.d_ff % number == 0,
            f"{argument}={number}: must divide the FFN width, which is {ffn.d_ff} in {ffn.name}{hint}",
        )
        return number


def select_moe_layers(model: nn.Module, filter_fn: LayerFilterFn | None) -> dict[str, MoELayer]:
    """The MoE layers of ``model`` by name, first to last.

    Raises:
        ConfigError: If there are none.
    """
    layers = moe_layers(model, filter_fn)
    check(bool(layers), f"{type(model).__name__}: no MoE layer found{' that the filter admits' if filter_fn else ''}")
    return layers


def convert_to_moe_(
    model: nn.Module,
    config: ExpertsConfig,
    filter_fn: FilterFn | None = None,
    *,
    assignments: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace dense FFNs by MoE layers that compute the same function.

    Experts have parameters of their own: optimizers, averages and hooks are for after it.

    Args:
        model: A model that an adapter knows.
        config: Number of experts.
        filter_fn: ``(ffn, name) -> bool``; which FFNs to convert, all if not given.
        assignments: Expert of each neuron, ``(d_ff,)``, by the FFN's name; neurons in order if not given.

    Raises:
        ConfigError: If a width is not divisible by the number of experts, an assignment is unbalanced, or no FFN is
            found. The model is then as it was.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> type(model.transformer.h[0].mlp).__name__
        'MoELayer'
    """
    for _ in convert_each_(model, config, filter_fn, assignments):
        pass


def convert_each_(
    model: nn.Module, config: ExpertsConfig, filter_fn: FilterFn | None, assignments: Mapping[str, Tensor] | None
) -> Iterator[MoELayer]:
    """As :func:`convert_to_moe_`, giving each layer once it is in its place, before the next FFN is read."""
    check_kind(config, ExpertsConfig)
    adapter = adapter_for(model)
    ffns = select_ffns(model, filter_fn)
    numbers = [config.num_for(ffn) for ffn in ffns]
    if assignments is not None:
        for ffn, num_experts in zip(ffns, numbers, strict=True):
            check(ffn.name in assignments, f"assignments: have none for {ffn.name}; are for {', '.join(assignments)}")
            check_assignment(assignments[ffn.name], ffn.d_ff, num_experts, ffn.name)
    check_not_hooked(replaced_modules(model, ffns))
    while ffns:
        ffn, num_experts = ffns.pop(0), numbers.pop(0)  # each dense FFN goes before the next one's experts come
        experts = Experts(ffn, num_experts, None if assignments is None else assignments[ffn.name])
        context = shared_context_(model, ffn.name)
        layer = MoELayer(experts, context, ffn.output_dropout).train(model.get_submodule(ffn.name).training)
        if ffn.is_projection:
            model.set_submodule(ffn.name, layer)
        else:
            adapter.put_(model, ffn, layer)
        yield layer
    adapter.mark_converted_(model)


def add_routers_(model: nn.Module, config: RouterConfig, filter_fn: LayerFilterFn | None = None) -> None:
    """Give every MoE layer a freshly initialised router.

    Raises:
        ConfigError: If there is no MoE layer.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ExpertsConfig, RouterConfig, add_routers_, convert_to_moe_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> add_routers_(model, RouterConfig(width=4))
        >>> type(model.transformer.h[0].mlp.router).__name__
        'RegressionRouter'
    """
    check_kind(config, RouterConfig)
    check_not_quantized(model)
    check_weights_are_here(model)
    for layer in select_moe_layers(model, filter_fn).values():
        layer.router = make_router(layer.own_experts, config)
    set_budget_path_(model, None)  # which was measured with others, here and below


def add_stand_ins_(model: nn.Module, config: StandInConfig, filter_fn: LayerFilterFn | None = None) -> None:
    """Give every MoE layer a stand-in for skipped experts that is zero until it is fitted; with rank 0, take it away.

    Raises:
        ConfigError: If there is no MoE layer, or one narrower than the rank.
    """
    check_kind(config, StandInConfig)
    check_not_quantized(model)
    check_weights_are_here(model)
    layers = select_moe_layers(model, filter_fn)
    for name, layer in layers.items():
        config.check_fits(layer.own_experts, name)
    for layer in layers.values():
        layer.stand_in = None if config.rank == 0 else make_stand_in(layer.own_experts, config)
    set_budget_path_(model, None)


def add_cutoffs_(model: nn.Module, config: CutoffConfigs, filter_fn: LayerFilterFn | None = None) -> None:
    """Give every MoE layer cutoffs, which leave out nothing until they are fitted; with shares of 1, take them away.

    Where there are no gates to cut, the share of these is taken as 1.

    Raises:
        ConfigError: If there is no MoE layer.
    """
    for name, layer in select_moe_layers(model, filter_fn).items():
        experts, own = layer.own_experts, config if isinstance(config, CutoffConfig) else config[name]
        own = own if experts.is_gated else own.without_gates()
        layer.cutoffs = None if own.leaves_out_nothing else Cutoffs(own).to(experts.down_weight.device)
    set_budget_path_(model, None)


def check_chosen(layers: Mapping[str, MoELayer]) -> None:
    """Raise ``ConfigError`` if a layer has nothing to choose experts by, as what is fitted to choices needs."""
    for name, layer in layers.items():
        check(
            layer.router is not None and layer.gate is not None,
            f"{name}: has no router or no gate yet; run RouterRegression or ExpertSelection first",
        )


def set_gate_(model: nn.Module, config: GateConfig | None, filter_fn: LayerFilterFn | None = None) -> None:
    """Set the gating rule, and ``tau`` or ``k``, of every MoE layer; ``None`` runs every expert without routing.

    Raises:
        ConfigError: If there is no MoE layer, one without a router, or with one from outside whose scores are negative
            or no numbers, or one with fewer than ``k`` experts.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ExpertsConfig, GateConfig, RouterConfig
        >>> from d2dmoe_pl import add_routers_, convert_to_moe_, set_gate_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> add_routers_(model, RouterConfig(width=4))
        >>> set_gate_(model, GateConfig("topk", k=2))
        >>> model.transformer.h[0].mlp.gate
        Gate(rule=topk, k=2)
    """
    if config is not None:
        check_kind(config, GateConfig)
    layers = select_moe_layers(model, filter_fn)
    for name, layer in layers.items():
        has_router = config is None or layer.router is not None
        check(has_router, f"{name}: has no router yet; run RouterRegression or ExpertSelection first")
        check(
            config is None or config.k is None or config.k <= layer.sizes.num_experts,
            f"k={config and config.k}: must be at most the number of experts, {layer.sizes.num_experts} in {name}",
        )
        if config is not None:
            experts, by_order = layer.own_experts, takes_k(GATING_RULES.find(config.rule, "rule"))
            try_router(layer.get_router(), experts.d_model, experts.up_weight, may_be_negative=by_order)
    for layer in layers.values():
        layer.gate = None if config is None else Gate(config)


@contextmanager
def temporary_gate(model: nn.Module, config: GateConfig | None) -> Iterator[None]:
    """Run the body with another gate in every MoE layer, then put the previous ones back."""
    before = {layer: layer.gate for layer in select_moe_layers(model, None).values()}
    set_gate_(model, config)
    try:
        yield
    finally:
        for layer, gate in before.items():
            layer.gate = gate


def set_tau_(model: nn.Module, tau: float, filter_fn: LayerFilterFn | None = None) -> None:
    """Set ``tau`` of every MoE layer, keeping its rule; no retraining is needed to move along the curve.

    Raises:
        ConfigError: If ``tau`` is outside [0, 1], or a layer has no gate.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ExpertsConfig, GateConfig, RouterConfig
        >>> from d2dmoe_pl import add_routers_, convert_to_moe_, set_gate_, set_tau_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> add_routers_(model, RouterConfig(width=4))
        >>> set_gate_(model, GateConfig("dynk_max"))
        >>> set_tau_(model, 0.8)
        >>> model.transformer.h[0].mlp.gate
        Gate(rule=dynk_max, tau=0.8)
    """
    layers = select_moe_layers(model, filter_fn)
    for name, layer in layers.items():
        check(layer.gate is not None, f"{name}: has no gate; use set_gate_")
    check_tau(tau)
    for layer in layers.values():
        layer.get_gate().set_tau(tau)
        layer.own_experts.measured.clear()


def set_backend_(model: nn.Module, backend: str, filter_fn: LayerFilterFn | None = None) -> None:
    """Choose how every MoE layer runs its experts, by the name of a backend, e.g. of a file in ``moe/execution``.

    Raises:
        ConfigError: If there is no MoE layer, or no such backend.

    Example:
        >>> import transformers
        >>> from d2dmoe_pl import ExpertsConfig, convert_to_moe_, set_backend_
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> convert_to_moe_(model, ExpertsConfig(num_experts=4))
        >>> set_backend_(model, "reference")
        >>> model.transformer.h[0].mlp.experts.backend
        'reference'
    """
    for layer in select_moe_layers(model, filter_fn).values():
        for module in layer.experts.modules():  # of experts that are trained whole, PEFT has a copy each
            if isinstance(module, Experts):
                module.set_backend(backend)
