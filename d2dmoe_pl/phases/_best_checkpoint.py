"""The epoch that goes on: where a metric is monitored, the best one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from d2dmoe_pl.notices import notice
from d2dmoe_pl.phases._exact_averages import put_averages_


@dataclass(frozen=True)
class BestEpoch:
    """An epoch that was the best by a metric.

    Attributes:
        monitor: Name of the metric.
        score: Its value.
        epoch: Which epoch it was, from 0.
        step: After which step.
    """

    monitor: str
    score: float
    epoch: int
    step: int


def restore_best_(module: L.LightningModule) -> BestEpoch | None:
    """Give a fitted module the weights of its best checkpoint, by the first ``ModelCheckpoint`` that monitors a metric.

    Where none does, it is given their averages over its steps, if it has some.

    Args:
        module: Still in its trainer.

    Returns:
        What the best epoch was; None if none is monitored, or was judged.
    """
    trainer = module.trainer
    put_averages_(module)
    monitored = next((callback for callback in _keeping(trainer) if callback.monitor is not None), None)
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
    score, epoch, step = monitored.best_model_score, checkpoint["epoch"], checkpoint["global_step"]
    best = BestEpoch(monitored.monitor, float(score), int(epoch), int(step))  # type: ignore[arg-type]
    notice(f"Epoch {best.epoch + 1} goes on, the best by {best.monitor}: {best.score:.6g} ({Path(path).name}).")
    return best


def find_moved_(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a checkpoint that is resumed from name the others where they are now, if their folder was renamed or copied.

    Lightning would forget the best of the epochs before.

    Args:
        trainer: Whose callbacks are set up.
        checkpoint: Is changed in place.
    """
    for callback in _keeping(trainer):
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        before = None if state is None else state.get("dirpath")
        if before is None or callback.dirpath is None or before == callback.dirpath:
            continue
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = _moved(state[key], before, callback.dirpath)
        kept = state["best_k_models"].items()
        state["best_k_models"] = {_moved(path, before, callback.dirpath): score for path, score in kept}
        state["dirpath"] = callback.dirpath


def _keeping(trainer: L.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _moved(path: str, before: str | Path, now: str | Path) -> str:
    """Where the file at ``path`` in the folder ``before`` is in the folder ``now``, if it is there."""
    place = os.path.join(now, os.path.relpath(path, before)) if path else path
    return place if os.path.isfile(place) else path
