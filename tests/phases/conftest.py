"""Artifacts of earlier phases."""

import pytest
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression


@pytest.fixture
def artifact(tmp_path):
    """Write the artifact of an earlier phase, ReLU and 10 classes, at the stage asked for."""

    def make(stage, activation="relu"):
        path = tmp_path / f"{stage}-{activation}"
        model = digits_source().build(DIGIT_LABELS)
        phases = [FineTuning(source=digits_source(), activation=activation)]
        phases += [ExpertClustering(8)] if stage != "dense" else []
        phases += [RouterRegression(8)] if stage == "routed" else []
        for phase in phases:
            phase.transform_(model)
            phase.finish_(model)
        save_artifact(model, path, [PhaseRecord(type(phase).__name__) for phase in phases])
        return str(path)

    return make
