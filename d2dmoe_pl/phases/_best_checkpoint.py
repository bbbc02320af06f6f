"""The epoch that goes on: where a metric is monitored, the best one."""

from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from d2dmoe_pl.notices import notice


@dataclass(frozen=True)
class BestEpoch:
    """An epoch that was the best by a metric.

    Attributes:
        monitor: Name of the metric.
        score: Its value.
        epoch: Which epoch it was, from 0.
    """

    monitor: str
    score: float
    epoch: int


def restore_best_(module: L.LightningModule) -> BestEpoch | None:
    """Give a fitted module the weights of its best checkpoint, by the first ``ModelCheckpoint`` that monitors a metric.

    Args:
        module: Still in its trainer.

    Returns:
        What the best epoch was; None if none is monitored, or was judged.
    """
    trainer = module.trainer
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    monitored = next((callback for callback in callbacks if callback.monitor is not None), None)
    if monitored is None:
        return None
    trainer.strategy.barrier()
    path = trainer.strategy.broadcast(monitored.best_model_path)
    if not path or not Path(path).exists():
        notice(f"No checkpoint of the best {monitored.monitor} is there: the last epoch goes on.")
        return None
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    assert monitored.monitor is not None
    best = BestEpoch(monitored.monitor, float(monitored.best_model_score), int(checkpoint["epoch"]))  # type: ignore[arg-type]
    notice(f"Epoch {best.epoch + 1} goes on, the best by {best.monitor}: {best.score:.6g} ({Path(path).name}).")
    return best
