"""Lightning's averages of weights, kept to what is averaged, and begun from what has been trained so far."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn


class ExactAverages(L.Callback):
    """Correct what ``WeightAveraging`` and ``EMAWeightAveraging`` leave of a phase; every phase brings this along.

    By themselves, they average whole numbers, such as ids, and cut off what is behind the point; move what is not
    trained by errors of rounding; and, until their first step, give a model before training for validation, for
    checkpoints and for what training leaves.
    """

    def setup(self, trainer: Any, phase: Any, stage: str) -> None:
        for average in _averages(trainer):
            average.avg_fn, average.multi_avg_fn = _exact(average), None

    def on_train_start(self, trainer: Any, phase: Any) -> None:
        self._follow(trainer, phase)

    def on_train_batch_end(self, trainer: Any, phase: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._follow(trainer, phase)

    @torch.no_grad()
    def _follow(self, trainer: Any, phase: nn.Module) -> None:
        for average in _averages(trainer):
            if average.n_averaged == 0:
                for followed, current in zip(_tensors(average.module), _tensors(phase), strict=True):
                    followed.copy_(current)


def put_averages_(phase: L.LightningModule) -> None:
    """Give a fitted phase its averages, if there are any; where a training had ended already, nothing else would."""
    for callback in phase.trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._copy_average_to_current(phase)


def _averages(trainer: Any) -> list[AveragedModel]:
    kept = [each._average_model for each in trainer.callbacks if isinstance(each, WeightAveraging)]
    return [average for average in kept if average is not None]  # there is one while it is fitted


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _exact(average: AveragedModel) -> Any:
    """The function by which it averages, for one tensor at a time, that leaves alone what does not change."""
    own, of_several = average.avg_fn or get_swa_avg_fn(), average.multi_avg_fn

    def averaged(mean: Tensor, current: Tensor, number: Tensor | int) -> Tensor:
        if not mean.is_floating_point():
            return current
        if of_several is None:
            found = own(mean, current, number)
        else:
            found = mean.clone()
            of_several([found], [current], number)
        return torch.where(mean == current, current, found)

    return averaged
