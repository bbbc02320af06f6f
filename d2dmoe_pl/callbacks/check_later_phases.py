"""Data that is too little for a later phase of a chain is told before the first one trains."""

from collections.abc import Sequence

import lightning as L

from d2dmoe_pl.phases import Phase


class CheckLaterPhases(L.Callback):
    """Hold the data of a phase that begins, which is set up by then, against what later phases need of it.

    Args:
        phases: Those that are fitted on the same data.

    Raises:
        ConfigError: If it is too little for one of them.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = phases

    def on_fit_start(self, trainer: L.Trainer, phase: Phase) -> None:
        for later in self.phases:
            later.check_data(phase)
