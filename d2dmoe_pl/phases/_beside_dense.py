"""What settings of the layers do to predictions and FLOPs, beside the same model with every expert on."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.data.task import Batch
from d2dmoe_pl.hooks import hooked
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.budgets.block_replay import BlockReplay
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.layer import MoELayer
from d2dmoe_pl.phases._held_out import moved
from d2dmoe_pl.phases._phase import Phase

LEFT_VALUES = 2**27  # at most, of all batches that are left: half a gigabyte in float32


class BesideDense:
    """Batches that a model is run on again and again, at one setting of its layers after the other.

    Kept on the device, for all batches until they are left, are what :class:`BlockReplay` keeps, and the logits with
    every expert on. Those over a vocabulary can be left out: kept is then what its head is given, ``d_model`` values a
    token, from which they are computed anew, each time a batch.

    Args:
        phase: In its trainer; its model has gates.
        batches: As they come from the data.
        keeps_vocabulary: Whether logits over a vocabulary are kept.
    """

    def __init__(self, phase: Phase, batches: Sequence[Batch], keeps_vocabulary: bool) -> None:
        layers = moe_layers(phase.model)
        self.batches = batches
        self._phase = phase
        self._layers = list(layers.values())
        self._replay = BlockReplay(phase.model, list(layers))
        self._head = adapter_for(phase.model).vocabulary_head(phase.model)
        self._keeps_vocabulary = keeps_vocabulary
        # by batch, with every expert on: the logits, and, where there is a head over a vocabulary, what it is given
        self._logits: dict[int, Tensor] = {}
        self._head_inputs: dict[int, Tensor] = {}
        # by batch and layer, what was done when it ran last, in pairs, and tokens
        self._counts: dict[int, dict[int, tuple[float, int]]] = {}

    def run(self, number: int, taus: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Run one batch with a tau for each layer, which the gates keep.

        Args:
            number: Of the batch.
            taus: Of the layers, first to last.

        Returns:
            The logits; and, ``(4,)`` float64, to be added up over batches: the divergence times the batch's weight,
            FFN FLOPs, those of the dense model, the weight.
        """
        task, batch = self._phase.task, moved(self._phase, self.batches[number])
        if number not in self._logits and number not in self._head_inputs:
            self._run_dense(number, batch)
        logits = self._run(number, batch, taus)
        flops = _ffn_flops(self._layers, self._counts[number])
        divergence = task.prediction_loss(logits, self._dense_logits(number, batch, taus), batch)
        weight = task.weight(self.batches[number])
        sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
        sums[0], sums[1], sums[2], sums[3] = weight * divergence, *flops, weight
        return logits, sums

    def leave(self, number: int) -> None:
        """Keep of a batch no more than spares the dense model's run when it comes again, and that of some batches."""
        self._replay.forget(number)
        self._counts.pop(number, None)
        ends = self._logits if self._head is None else self._head_inputs
        if self._head is not None:
            self._logits.pop(number, None)
        if sum(end.numel() for end in ends.values()) > LEFT_VALUES:
            ends.pop(number, None)

    def _run(self, number: int, batch: Batch, taus: Sequence[float]) -> Tensor:
        counts: dict[int, tuple[float, int]] = {}

        def count(index: int, work: Tensor) -> None:
            ran, tokens = counts.get(index, (0.0, 0))  # some run several times
            counts[index] = ran + float(work.sum()), tokens + len(work)

        for layer, tau in zip(self._layers, taus, strict=True):
            layer.get_gate().set_tau(tau)
        watched = hooked(layer.watch_work(partial(count, index)) for index, layer in enumerate(self._layers))
        with watched, self._replay.running(number, taus):
            logits = self._phase.logits(batch)
        self._counts[number] = self._counts.get(number, {}) | counts  # those that do not run again have what was
        return logits

    def _run_dense(self, number: int, batch: Batch) -> None:
        given: list[Tensor] = []
        with self._before_head(lambda _, args: given.extend(args)):
            logits = self._run(number, batch, [1.0] * len(self._layers))
        if given:
            self._head_inputs[number] = given[0]
        if not given or self._keeps_vocabulary:
            self._logits[number] = logits

    def _dense_logits(self, number: int, batch: Batch, taus: Sequence[float]) -> Tensor:
        """The logits with every expert on, where the batch has just been run at ``taus``."""
        if number in self._logits:
            return self._logits[number]
        kept = self._head_inputs[number]
        with self._before_head(lambda _, args: (kept, *args[1:])):
            logits = self._run(number, batch, taus)  # of which, settings being the same, only the end is run
        if self._keeps_vocabulary:
            self._logits[number] = logits
        return logits

    def _before_head(self, hook: Callable[[nn.Module, tuple], tuple | None]) -> AbstractContextManager[None]:
        return hooked([] if self._head is None else [self._head.register_forward_pre_hook(hook)])


def _ffn_flops(layers: Sequence[MoELayer], counts: Mapping[int, tuple[float, int]]) -> tuple[float, float]:
    """FLOPs of the layers, by the work and the tokens of each, and those of the dense FFNs."""
    ran = dense = 0.0
    for index, layer in enumerate(layers):
        work, tokens = counts[index]
        ran += work * pair_flops(layer.sizes) + layer.flops_beside_experts(tokens, 1)
        dense += tokens * dense_ffn_flops(layer.sizes)
    return ran, dense
