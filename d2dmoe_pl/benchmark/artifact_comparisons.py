"""Comparisons over a converted model, each of its MoE layers and the whole, at each ``tau``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, read_artifact
from d2dmoe_pl.benchmark.compared_modules import Choice, layer_comparison, layer_inputs, model_comparison
from d2dmoe_pl.benchmark.comparison import Comparison, Settings
from d2dmoe_pl.data import TaskData
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.errors import check
from d2dmoe_pl.moe.conversion import set_backend_, temporary_gate
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers, select_ffns
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.phases._model_checks import check_head

# of a batch's samples in, a batch out
Batches = Callable[[int], Batch]


def artifact_comparisons(
    path: str, taus: Sequence[float], data: TaskData | None, length: int, settings: Settings
) -> Iterator[Comparison]:
    """Every combination of dtype and batch size, whole model first, then layer by layer.

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
    for dtype in settings.dtype:
        moe = load_model(path)
        layers = moe_layers(moe)
        check(
            len(layers) > 0 and all(layer.gate is not None for layer in layers.values()),
            f"artifact={path!r}: is the work of {artifact.phase}, at stage {artifact.stage!r}; must have MoE layers "
            "with routers and a tau, which RouterRegression makes",
        )
        set_backend_(moe, settings.backend)
        batches = partial(random_batch, moe, length=length) if data is None else partial(first_batch, moe, data)
        dense = load_model(path)
        merge_to_dense_(dense)
        for model in (dense, moe):
            model.to(settings.device, dtype)
        for batch_size in settings.batch_size:
            batch = _to(batches(batch_size), settings.device, dtype)
            yield from _comparisons(dense, moe, batch, taus, settings)


def _comparisons(
    dense: nn.Module, moe: nn.Module, batch: Batch, taus: Sequence[float], settings: Settings
) -> Iterator[Comparison]:
    with temporary_gate(moe, None):
        inputs = layer_inputs(moe, batch)
    if "model" in settings.scope:
        yield model_comparison(dense, moe, batch, inputs, _choices(moe, taus))
    if "layer" in settings.scope:
        ffns = {ffn.name: ffn for ffn in select_ffns(dense)}
        for name, layer in moe_layers(moe).items():
            choices = _choices(layer, taus)
            compare = dict.fromkeys(settings.compare, choices)
            yield layer_comparison(name, ffns[name], layer, inputs[name].tokens, choices, compare)


def _choices(module: nn.Module, taus: Sequence[float]) -> list[Choice]:
    """The gating rule that the model was saved with, at each ``tau``."""
    layer: MoELayer = next(iter(moe_layers(module).values()))
    rule = layer.get_gate().config.rule
    return [Choice(partial(temporary_gate, module, GateConfig(rule, tau)), router=True, tau=tau) for tau in taus]


def random_batch(model: nn.Module, batch_size: int, length: int) -> Batch:
    """A batch of noise for ``model``."""
    return adapter_for(model).random_inputs(model, batch_size, length)


def first_batch(model: nn.Module, data: TaskData, batch_size: int) -> Batch:
    """The first samples of the test split.

    Raises:
        ConfigError: If there are fewer, or the model has not the head that the data needs.
    """
    check_head(model, data.head)
    data.prepare_data()
    data.setup()
    data.batch_size = batch_size
    loader = data.predict_dataloader()  # in order, as samples come
    batch = next(iter(loader[0] if isinstance(loader, list) else loader))
    samples = len(batch["labels"])
    check(samples == batch_size, f"batch_size={batch_size}: must be at most {samples}, the samples of the test split")
    return batch


def _to(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on ``device``, what is no index or mask in ``dtype``."""
    return {
        key: value.to(device, dtype) if value.is_floating_point() else value.to(device) for key, value in batch.items()
    }
