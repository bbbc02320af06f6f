"""Comparisons over a converted model, the whole of it and each of its MoE layers, at each ``tau``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, read_artifact
from d2dmoe_pl.benchmark.compared_modules import Choice, layer_comparison, layer_inputs, model_comparison
from d2dmoe_pl.benchmark.comparison import Comparison, Settings
from d2dmoe_pl.benchmark.decoding import check_decodes, decoding_comparison
from d2dmoe_pl.benchmark.runtimes import RUNTIMES
from d2dmoe_pl.benchmark.scoring import Scoring, first_batches, placed, scoring_of
from d2dmoe_pl.benchmark_arguments import AHEAD_OF_TIME
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.ahead_of_time import attach_programs_, write_programs
from d2dmoe_pl.moe.budgets.budget_path import budget_path, set_budget_
from d2dmoe_pl.moe.conversion import set_backend_, temporary_gate
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.optimization import optimize_

# of a batch's samples in, batches out
Batches = Callable[[int], list[Batch]]


def artifact_comparisons(
    path: str, taus: Sequence[float], data: TaskData | None, length: int, settings: Settings
) -> Iterator[Comparison]:
    """Whole models at every batch size, all types beside each other, then layer by layer, one type after the other.

    Whole models write text instead of reading it where the settings say so.

    Args:
        path: Of the artifact.
        taus: In [0, 1], each a way of its own.
        data: Whose test samples are run; None for noise.
        length: Tokens of each text, where texts are noise.
        settings: As for every benchmark.

    Raises:
        ConfigError: If the artifact is none, or has no MoE layers with routers and gates, or the data does not fit.
    """
    artifact = read_artifact(path, "artifact")
    check(
        not artifact.quantized,
        f"artifact={path!r}: is in int8, which has no dense twin; must be the artifact that it was made from",
    )
    dense = load_model(path)
    layers = moe_layers(dense)
    check(
        len(layers) > 0 and all(layer.gate is not None for layer in layers.values()),
        f"artifact={path!r}: is the work of {artifact.phase}, at stage {artifact.stage!r}; must have MoE layers "
        "with routers and a tau, which RouterRegression makes",
    )
    if settings.decode:
        check_decodes(dense, settings.decode)
    path_of_budgets = budget_path(dense)
    if settings.budgets:
        check(
            path_of_budgets is not None,
            f"artifact={path!r}: knows no budgets; must be what BudgetCalibration left, or have taus",
        )
        check("layer" not in settings.scope, "budget: only of whole models; leave --scope layer out")
        for budget in settings.budgets:
            path_of_budgets.at_cost("ffn_flops", budget)  # type: ignore[union-attr] # which it is not, by now
    merge_to_dense_(dense)
    moes = {dtype: _converted(path, dtype, settings) for dtype in settings.dtype}
    some = next(iter(moes.values()))
    batches = partial(random_batches, some, length=length) if data is None else partial(first_batches, some, data)
    scoring = None if data is None else scoring_of(some, data, settings.scored_samples)
    if "model" in settings.scope:
        compared = _writing if settings.decode else partial(_whole, plain=_plain(path, moes, settings))
        for batch_size in settings.batch_size:
            yield compared(dense, moes, batches(batch_size), taus, scoring, settings)
    if "layer" in settings.scope:
        for dtype, moe in moes.items():
            _place_(dense, settings.device, settings.floating(dtype))
            for batch_size in settings.batch_size:
                batch = placed(batches(batch_size)[0], settings.device, settings.floating(dtype))
                yield from _layers(dense, moe, batch, taus, settings)


def _converted(path: str, dtype: torch.dtype, settings: Settings) -> nn.Module:
    moe = load_model(path, dtype=dtype)
    set_backend_(moe, settings.backend)
    _place_(moe, settings.device, settings.floating(dtype))
    return moe


def _plain(path: str, moes: dict[torch.dtype, nn.Module], settings: Settings) -> nn.Module | None:
    """A model in the type of the dense one, to tell how long it takes outside its FFNs; of compiled ones, none."""
    if settings.optimize:
        return None
    return moes.get(settings.dense_dtype) or _converted(path, settings.dense_dtype, settings)


def _whole(
    dense: nn.Module,
    moes: dict[torch.dtype, nn.Module],
    batches: list[Batch],
    taus: Sequence[float],
    scoring: Scoring | None,
    settings: Settings,
    plain: nn.Module | None,
) -> Comparison:
    _place_(dense, settings.device, settings.dense_dtype)
    rivals = {name: RUNTIMES[name](dense, batches) for name in settings.compare if name in RUNTIMES}
    choices = {dtype: _whole_choices(moe, taus, settings.budgets) for dtype, moe in moes.items()}
    batches_in = {
        dtype: [placed(batch, settings.device, dtype) for batch in batches]
        for dtype in {*map(settings.floating, moes), settings.dense_dtype}
    }
    first = next(iter(moes))
    with temporary_gate(moes[first], None):
        inputs = [layer_inputs(moes[first], batch) for batch in batches_in[settings.floating(first)]]
    _optimize(moes, batches[0], settings)
    return model_comparison(dense, moes, batches_in, inputs, choices, rivals, scoring, plain)


def _writing(
    dense: nn.Module,
    moes: dict[torch.dtype, nn.Module],
    batches: list[Batch],
    taus: Sequence[float],
    scoring: Scoring | None,
    settings: Settings,
) -> Comparison:
    _place_(dense, settings.device, settings.dense_dtype)
    choices = {dtype: _whole_choices(moe, taus, settings.budgets) for dtype, moe in moes.items()}
    batch = placed(batches[0], settings.device, settings.dense_dtype)
    comparison = decoding_comparison(dense, moes, batch, settings.decode, choices, scoring, settings.gguf)
    _optimize(moes, batches[0], settings)
    return comparison


def _optimize(moes: dict[torch.dtype, nn.Module], batch: Batch, settings: Settings) -> None:
    for dtype, moe in moes.items():
        if not settings.optimize or moe._compiled_call_impl is not None:
            continue
        if settings.optimize == AHEAD_OF_TIME:
            for layer in moe_layers(moe).values():
                layer.get_gate().set_tau(1.0)  # each choice sets one; with a number of experts, programs are others
            with TemporaryDirectory() as folder:
                write_programs(moe, placed(batch, settings.device, settings.floating(dtype)), Path(folder))
                attach_programs_(moe, Path(folder))
        else:
            optimize_(moe)


def _layers(
    dense: nn.Module, moe: nn.Module, batch: Batch, taus: Sequence[float], settings: Settings
) -> Iterator[Comparison]:
    with temporary_gate(moe, None):
        inputs = layer_inputs(moe, batch)
    ffns = {ffn.name: ffn for ffn in select_ffns(dense)}
    for name, layer in moe_layers(moe).items():
        choices = _choices(layer, taus)
        compare = {name: choices for name in settings.compare if name not in RUNTIMES}
        yield layer_comparison(name, ffns[name], layer, inputs[name].tokens, choices, compare)


def _choices(module: nn.Module, taus: Sequence[float]) -> list[Choice]:
    """The gating rule that the model was saved with, at each ``tau``."""
    return [Choice(partial(_at_tau, module, tau), router=True, tau=tau) for tau in taus]


def _whole_choices(model: nn.Module, taus: Sequence[float], budgets: Sequence[float]) -> list[Choice]:
    """Budgets, with a ``tau`` for each layer, if there are any."""
    if not budgets:
        return _choices(model, taus)
    return [Choice(partial(_at_budget, model, budget), router=True, budget=budget) for budget in budgets]


@contextmanager
def _at_budget(model: nn.Module, budget: float) -> Iterator[None]:
    """Run the body at a budget, by gates that stay the same."""
    with _at_tau(model, 1.0):
        set_budget_(model, ffn_flops=budget)
        yield


@contextmanager
def _at_tau(module: nn.Module, tau: float) -> Iterator[None]:
    """Run the body at ``tau``, by gates that stay the same, so that what is compiled stays good."""
    gates = [layer.get_gate() for layer in moe_layers(module).values()]
    before = [gate.config for gate in gates]
    for gate in gates:
        gate.set_tau(tau)
    try:
        yield
    finally:
        for gate, config in zip(gates, before, strict=True):
            gate.set_config(config)


def random_batches(model: nn.Module, batch_size: int, length: int) -> list[Batch]:
    """A batch of noise for ``model``."""
    return [adapter_for(model).random_inputs(model, batch_size, length)]


def _place_(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast a model, as who loads it in that type has it."""
    with adapter_for(model).exact_buffers(model):
        model.to(device, dtype)
