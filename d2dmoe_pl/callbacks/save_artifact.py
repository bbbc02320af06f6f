"""Every fitted phase leaves an artifact."""

from pathlib import Path
from typing import Any

import lightning as L

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.artifact_parts import PhaseRecord
from d2dmoe_pl.phases import Phase
from d2dmoe_pl.sharded_tensors import is_sharded

FOLDER = "artifact"
WISHED = "model"  # in the folder of a chain that ``compress`` ran, the same set to what was wished for


class SaveArtifact(L.Callback):
    """Write the fitted model to ``artifact`` in the run's folder, with its tokenizer or image processor."""

    def on_fit_end(self, trainer: Any, phase: Phase) -> None:
        phase.end_training()
        folder = trainer.log_dir or trainer.default_root_dir  # asked on every process
        takes_part = trainer.is_global_zero or is_sharded(phase.model)
        if takes_part and not trainer.fast_dev_run:
            metrics = phase.measured
            if phase.best is not None:  # the others are of the last epoch
                metrics = {phase.best.monitor: phase.best.score}
            record = PhaseRecord(type(phase).__name__, metrics)
            processor = phase.data.save_processor
            save_artifact(phase.model, Path(folder) / FOLDER, [*phase.history, record], processor, phase.tensors())
        trainer.strategy.barrier()
