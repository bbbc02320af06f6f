"""Lightning's callbacks that no phase can run with."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from d2dmoe_pl.errors import check


def check_callbacks(callbacks: Sequence[Callback], phase: Any) -> None:
    """Raise ``ConfigError`` for a callback that would break a phase, do nothing, or undo what the phase does."""
    kept_as = [callback.state_key for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    # by these a trainer tells apart whose state in a checkpoint is whose
    check(
        len(set(kept_as)) == len(kept_as),
        "callbacks=ModelCheckpoint: must differ from others, and from that of every phase, which keeps the last epoch, "
        "in monitor, mode, every_n_epochs, every_n_train_steps or train_time_interval",
    )
    _check_files([callback for callback in callbacks if isinstance(callback, ModelCheckpoint)])
    for callback in callbacks:
        name = type(callback).__name__
        # it copies a phase before there is a model in it, so that it would average nothing, and replaces the schedule
        check(
            not isinstance(callback, StochasticWeightAveraging),
            f"callbacks={name}: must be WeightAveraging or EMAWeightAveraging, which know the model of a phase",
        )
        # what it has when a phase begins is given back at the end, unless there were steps of an optimizer
        check(
            not (isinstance(callback, WeightAveraging) and phase.takes_samples_in_order),
            f"callbacks={name}: must be left out of {type(phase).__name__}, which has no steps to average over",
        )
        # they try the training out before a phase has begun, and end it
        check(
            not isinstance(callback, BatchSizeFinder | LearningRateFinder),
            f"callbacks={name}: must be left out; batch_size and lr are set by hand",
        )
        # they look for the parameters of a phase before there is a model in it
        check(
            not isinstance(callback, BaseFinetuning | ModelPruning),
            f"callbacks={name}: must be left out; what is trained or pruned is up to transform_ of a phase of your own",
        )


def _check_files(checkpoints: Sequence[ModelCheckpoint]) -> None:
    files = [(callback.dirpath, callback.filename) for callback in checkpoints]
    for callback, file in zip(checkpoints, files, strict=True):
        # of names that are counted on, none is written to twice
        check(
            files.count(file) == 1 or callback._enable_version_counter,
            f"callbacks=ModelCheckpoint: filename={callback.filename!r} is that of another too, and one would be "
            "written in the place of the other; must differ, also from 'last', where every phase keeps its last epoch",
        )
