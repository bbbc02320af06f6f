"""Score the neurons of each FFN by their importance to the task. Trains nothing, changes nothing."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moebert.importance import Importance, check_scorable
from d2dmoe_pl.phases._ordered_pass import OrderedPass
from d2dmoe_pl.phases._phase import Batch

IMPORTANCE = "importance"


class ImportanceScoring(OrderedPass):
    """Score every neuron on the training split: MoEBERT (arXiv 2204.07675), section 3.1.

    The artifact is the model as it came, and beside it ``importance.safetensors``, with one tensor ``(d_ff,)`` for each
    FFN by its name. Scores are exact, from one backward pass a batch; they are summed over processes, and depend
    neither on the batch size nor on the number of processes. A sample of several predictions, as of words or of the
    next token, counts with the sum of their losses.

    Args:
        init_from: Artifact folder of an earlier phase. To evaluate: of this one.
        source: A pretrained model, instead of ``init_from``.
    """

    leaves: ClassVar[tuple[str, ...]] = (IMPORTANCE,)

    def transform_(self, model: nn.Module) -> None:
        check_scorable(select_ffns(model))

    def begin(self) -> None:
        self.importance = Importance(select_ffns(self.model), self.device)

    def sums(self) -> Mapping[str, Tensor]:
        return self.importance.scores

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        size = len(batch["labels"])
        samples = self.sample_numbers(size) < self.num_training_samples
        adapter, weight = adapter_for(self.model), self.task.weight(batch)
        seen, _ = adapter.in_order(batch)  # as the model is given it
        if weight > 0:  # the loss is a mean over what is predicted
            self.importance.add(
                lambda: self.task_loss(self.logits(batch), batch) * weight,
                lambda name: adapter.padding_mask(self.model, name, seen),
                samples.to(self.device),
            )
        self.advance(size)

    def conclude(self) -> None:
        scores = self.importance.scores
        summed = self.trainer.strategy.reduce(torch.cat(list(scores.values())), reduce_op="sum")
        parts = summed.split([len(score) for score in scores.values()])
        self.importance.scores = dict(zip(scores, parts, strict=True))
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                figure = draw_importance(self.importance.scores)
                logger.experiment.add_figure("layers/importance", figure, self.trainer.global_step)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {IMPORTANCE: self.importance.scores}


def draw_importance(scores: Mapping[str, Tensor]) -> Figure:
    """The scores of each FFN, ``(d_ff,)``, largest first, of all as shares of the layer's largest."""
    figure = Figure(figsize=(8, max(4.0, 0.18 * len(scores))), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"](torch.linspace(0, 0.9, len(scores)).tolist())
    for (name, score), colour in zip(scores.items(), colours, strict=True):
        shares = score / (float(score.max()) or 1.0)
        axes.plot(shares.sort(descending=True).values.cpu(), color=colour, label=name)
    axes.set_xlabel("neurons, by importance")
    axes.set_ylabel("importance, share of the layer's largest")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    return figure
