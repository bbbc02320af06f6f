"""Lightning's callbacks that no phase can run with."""

from collections.abc import Iterable

from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, StochasticWeightAveraging

from d2dmoe_pl.errors import check


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise ``ConfigError`` for a callback that would break a phase, or do nothing."""
    for callback in callbacks:
        name = type(callback).__name__
        # it copies a phase before there is a model in it, so that it would average nothing, and replaces the schedule
        check(
            not isinstance(callback, StochasticWeightAveraging),
            f"callbacks={name}: must be WeightAveraging or EMAWeightAveraging, which know the model of a phase",
        )
        # they try the training out before a phase has begun, and end it
        check(
            not isinstance(callback, BatchSizeFinder | LearningRateFinder),
            f"callbacks={name}: must be left out; batch_size and lr are set by hand",
        )
