"""What validation finds of the weights that go on, where these are others than those it saw last."""

from typing import Any

from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, WeightAveraging

TRAINING_CALLBACKS = (Checkpoint, EarlyStopping, WeightAveraging)  # they would keep, judge or exchange weights


def validate_again(trainer: Any) -> None:
    """Run validation at the end of a fit, with all callbacks but those that are for training.

    Args:
        trainer: In a fit whose training is over.
    """
    loop, kept = trainer.fit_loop.epoch_loop.val_loop, trainer.callbacks
    trainer.callbacks = [callback for callback in kept if not isinstance(callback, TRAINING_CALLBACKS)]
    trainer.validating, loop.restarting = True, False
    try:
        loop.run()
    finally:
        trainer.training, trainer.callbacks = True, kept
