"""What is measured: a layer or a model with experts, with its choice among them set from outside."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters import FFN, LinearRows, adapter_for, holder_of
from d2dmoe_pl.benchmark.alternatives import ALTERNATIVES
from d2dmoe_pl.benchmark.comparison import Comparison, Way
from d2dmoe_pl.benchmark.result_rows import PYTORCH
from d2dmoe_pl.benchmark.runtimes import RUNTIMES
from d2dmoe_pl.benchmark.scoring import Predict, Scoring, placed
from d2dmoe_pl.benchmark.timing import Contender
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops, skipped
from d2dmoe_pl.moe.execution import BACKENDS, Backend
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.moe.token_context import real_tokens
from d2dmoe_pl.weights_types import floating_type


@dataclass(frozen=True)
class Choice:
    """How experts are chosen while something is timed.

    Attributes:
        context: Sets the choice.
        router: Whether routers and gates run.
        tau: The gates' setting; None for preset masks and budgets.
        budget: Share of the dense FFNs' FLOPs that the gates are set to, instead.
    """

    context: Callable[[], AbstractContextManager]
    router: bool
    tau: float | None = None
    budget: float | None = None


@dataclass(frozen=True)
class LayerInput:
    """What a MoE layer is given.

    Attributes:
        tokens: Those that are no padding, ``(N, d_model)``, of all runs in a call.
        positions: How many there are with padding, which the dense FFN computes too.
    """

    tokens: Tensor
    positions: int


def find_way(name: str) -> Backend:
    """The backend ``name``, of ``benchmark/alternatives`` or of those that models run on.

    Raises:
        ConfigError: If there is none.
    """
    allowed = [*ALTERNATIVES.names(), *BACKENDS.names(), *RUNTIMES]
    check(name in allowed, f"compare={name!r}: allowed are {', '.join(allowed)}")
    return (ALTERNATIVES if name in ALTERNATIVES.names() else BACKENDS).find(name, "compare")


def run_dense(ffn: FFN, tokens: Tensor) -> Tensor:
    """The dense FFN, as its architecture computes it: ``(N, d_model)`` to the same shape."""
    up, down = holder_of(ffn.up), holder_of(ffn.down)
    if ffn.gate_proj is None:
        return down(ffn.activation(up(tokens)))
    if isinstance(ffn.up, LinearRows) and isinstance(ffn.gate_proj, LinearRows):
        both = up(tokens)  # (N, 2 * d_ff)
        return down(ffn.activation(both[:, ffn.gate_proj.rows]) * both[:, ffn.up.rows])
    return down(ffn.activation(holder_of(ffn.gate_proj)(tokens)) * up(tokens))


@torch.no_grad()
def layer_inputs(model: nn.Module, batch: Batch) -> dict[str, LayerInput]:
    """What each MoE layer is given in one call of the model, by the layer's name."""
    found: dict[str, LayerInput] = {}

    def register(name: str, layer: MoELayer) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            positions = args[0].flatten(0, -2)  # (B * L, d)
            tokens, before = real_tokens(positions, layer.context.token_index), found.get(name)
            if before is not None:  # some layers run several times a call
                found[name] = LayerInput(torch.cat([before.tokens, tokens]), before.positions + len(positions))
            else:
                found[name] = LayerInput(tokens, len(positions))

        return layer.register_forward_pre_hook(hook)

    # what is compiled with hooks stays in pieces without them, for batches of this shape
    with uncompiled(model), hooked(register(name, layer) for name, layer in moe_layers(model).items()):
        adapter_for(model).logits(model, batch)
    return found


@torch.no_grad()
def way(
    name: str,
    choice: Choice,
    module: nn.Module,
    call: Callable[[], object],
    positions: Mapping[str, int],
    parts: int = 1,
) -> Way:
    """One way to be timed, after one call to see what share of the experts runs.

    Args:
        name: Of the backend.
        choice: How experts are chosen.
        module: A model, or a MoE layer.
        call: Runs it.
        positions: Of each MoE layer in ``module``, how many positions its dense FFN would compute in a call.
        parts: Of a call, see :class:`Contender`.
    """
    layers = moe_layers(module)
    seen: dict[str, list[Tensor]] = {key: [] for key in layers}
    work: dict[str, list[Tensor]] = {key: [] for key in layers}
    with choice.context():  # which may put other gates there
        watching = [layer.watch(seen[key].append) for key, layer in layers.items()]
        working = [layer.watch_work(work[key].append) for key, layer in layers.items()]
        with hooked([*watching, *working]):
            call()
        masks = {key: torch.cat(some) for key, some in seen.items()}
        routed = layers if choice.router else {}
        beside = sum(layer.flops_beside_experts(len(masks[key]), 1) for key, layer in routed.items())
    pairs = {key: int(mask.sum()) for key, mask in masks.items()}
    # what runs experts in the layer's place leaves nothing out of them
    done = {key: float(torch.cat(some).sum()) if some else pairs[key] for key, some in work.items()}
    flops = sum(done[key] * pair_flops(layer.experts) for key, layer in layers.items()) + beside
    dense_flops = sum(positions[key] * dense_ffn_flops(layer.experts) for key, layer in layers.items())
    return Way(
        name=name,
        router=choice.router,
        tau=choice.tau,
        share=sum(pairs.values()) / sum(mask.numel() for mask in masks.values()),
        cost=flops / dense_flops,
        contender=Contender(call, choice.context, parts),
        budget=choice.budget,
    )


def layer_comparison(
    name: str, ffn: FFN, layer: MoELayer, tokens: Tensor, choices: list[Choice], compare: Mapping[str, list[Choice]]
) -> Comparison:
    """A MoE layer against its dense FFN, on the same tokens.

    Args:
        name: Of the layer.
        ffn: The dense FFN.
        layer: Its backend is set.
        tokens: ``(N, d_model)``.
        choices: To be timed with the layer's own backend.
        compare: To be timed with other ways, by their names.
    """
    positions = {"": len(tokens)}

    def other(function: Backend) -> Callable[[], Tensor]:
        return lambda: function(layer.experts, tokens, layer.choose(layer.score(tokens)))

    own = [way(layer.experts.backend, choice, layer, lambda: layer(tokens), positions) for choice in choices]
    others = [
        way(key, choice, layer, other(find_way(key)), positions) for key, some in compare.items() for choice in some
    ]
    return Comparison(
        scope="layer",
        name=name,
        dtype=tokens.dtype,
        num_experts=layer.experts.num_experts,
        batch_size=None,
        tokens=len(tokens),
        dense=Contender(lambda: run_dense(ffn, tokens)),
        ways=[replace(each, dtype=torch.int8) if layer.experts.is_quantized else each for each in (*own, *others)],
    )


def model_comparison(
    dense: nn.Module,
    moes: Mapping[torch.dtype, nn.Module],
    batches: Mapping[torch.dtype, Sequence[Batch]],
    inputs: Sequence[Mapping[str, LayerInput]],
    choices: Mapping[torch.dtype, list[Choice]],
    rivals: Mapping[str, Predict],
    scoring: Scoring | None = None,
    plain: nn.Module | None = None,
) -> Comparison:
    """A model with experts, in one or more types, against its dense twin, on the same batches.

    Args:
        dense: The dense model, in float32 where there is more than one type.
        moes: The same with experts, by type; their backends are set.
        batches: By type, those of the dense model too: samples in the first dimension.
        inputs: Of each batch, what :func:`layer_inputs` gave.
        choices: To be timed, by type.
        rivals: The dense model on other runtimes, by name.
        scoring: By what predictions are judged; None if they are not.
        plain: One with experts in the type of the dense model, not compiled, of which the time outside FFNs is taken;
            None if that is not to be known.
    """
    dense_type = next(dense.parameters()).dtype
    first = next(iter(moes))
    positions = {name: sum(given[name].positions for given in inputs) for name in inputs[0]}

    def over(predicted: Predict, dtype: torch.dtype) -> Callable[[], object]:
        return lambda: [predicted(batch) for batch in batches[dtype]][-1]

    def score(predicted: Predict, choice: Choice | None = None) -> float | None:
        if scoring is None:
            return None
        with nullcontext() if choice is None else choice.context():
            return scoring.score(predicted)

    parts = len(inputs)
    ways = [
        Way(name, False, None, 1.0, 1.0, Contender(over(rival, dense_type), parts=parts), None, True, score(rival))
        for name, rival in rivals.items()
    ]
    for dtype, moe in moes.items():
        floating = floating_type(moe)
        if floating not in {dense_type, *(way.dtype for way in ways)}:
            twin = copy.deepcopy(dense)
            adapter_for(twin).cast_(twin, floating)
            own = predict_by(twin)
            timed = Contender(over(own, floating), parts=parts)
            ways.append(Way(PYTORCH, False, None, 1.0, 1.0, timed, floating, True, score(own)))
        own = predict_by(moe)
        backend = next(iter(moe_layers(moe).values())).experts.backend
        for choice in choices[dtype]:
            with uncompiled(moe):  # which experts run is the same
                made = way(backend, choice, moe, over(own, floating), positions, parts)
            ways.append(replace(made, dtype=dtype, around=floating, score=score(own, choice)))
    experts = next(iter(moe_layers(moes[first]).values())).experts
    tokens = [len(next(iter(given.values())).tokens) for given in inputs]
    return Comparison(
        scope="model",
        name=type(dense).__name__,
        dtype=dense_type,
        num_experts=experts.num_experts,
        batch_size=len(next(iter(batches[dense_type][0].values()))),
        tokens=round(sum(tokens) / parts),
        dense=Contender(over(predict_by(dense), dense_type), parts=parts),
        ways=ways,
        rest=None
        if plain is None
        else Contender(over(predict_by(plain), dense_type), lambda: skipped(moe_layers(plain).values()), parts),
        scoring=scoring,
        dense_score=score(predict_by(dense)),
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the body without what ``optimize_`` made of ``model``."""
    compiled = model._compiled_call_impl
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def predict_by(model: nn.Module) -> Predict:
    """Logits by ``model`` of a batch that lies anywhere, and is of any type."""
    adapter, device, dtype = adapter_for(model), next(model.parameters()).device, floating_type(model)
    return lambda batch: adapter.logits(model, placed(batch, device, dtype))
