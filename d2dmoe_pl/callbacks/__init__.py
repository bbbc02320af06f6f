"""Lightning callbacks: what is measured, drawn and kept."""

from d2dmoe_pl.callbacks.purge_repeated_steps import PurgeRepeatedSteps
from d2dmoe_pl.callbacks.save_artifact import SaveArtifact
from d2dmoe_pl.callbacks.save_before_requeue import SaveBeforeRequeue
from d2dmoe_pl.callbacks.stop_on_non_finite import StopOnNonFinite
from d2dmoe_pl.callbacks.tau_sweep import TauSweep

__all__ = ["PurgeRepeatedSteps", "SaveArtifact", "SaveBeforeRequeue", "StopOnNonFinite", "TauSweep"]
