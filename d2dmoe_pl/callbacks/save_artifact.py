"""Every fitted phase leaves an artifact."""

from pathlib import Path
from typing import Any

import lightning as L

from d2dmoe_pl.artifact import CONFIG, read_artifact, save_artifact
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
            if phase.best is not None:  # which may be none of validation's
                metrics = {phase.best.monitor: phase.best.score, **metrics}
            record = PhaseRecord(type(phase).__name__, metrics)
            processor = phase.data.save_processor
            save_artifact(phase.model, Path(folder) / FOLDER, [*phase.history, record], processor, phase.tensors())
        trainer.strategy.barrier()


def is_wished(wished: Path, last: Path) -> bool:
    """Whether ``wished`` is the artifact of the phase ``last``, set to a wish; one that is redone leaves an older."""
    if not (wished / CONFIG).is_file():
        return False
    return read_artifact(wished).history == read_artifact(last / FOLDER).history
