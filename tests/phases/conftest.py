"""Artifacts of earlier phases."""

import pytest
import tiny
from digits_models import DIGIT_LABELS, digits_source

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.data import DatasetSource, LanguageModeling
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression

COSTS = {1.0: 1.0, 0.8: 0.7, 0.4: 0.5, 0.0: 0.2}  # by tau
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def make_data(tmp_path):
    """Data for a language model of a kind: texts in which a letter tells the next."""
    tokenizer = tiny.tokenizer(tmp_path / "tok", LETTERS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    texts = [" ".join(LETTERS[(i + 3 * j) % 26] for j in range(5 + i % 7)) for i in range(200)]
    path = str(tmp_path / "texts.txt")
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    source = DatasetSource(train=path, validation=path, test=None)

    def make(kind, length=12):
        objective = tiny.TASKS[kind].partition("-")[0]
        return LanguageModeling(source, tokenizer, objective, length, batch_size=8)

    return make


def budgets_of(model):
    """A way down, of costs that are made up."""
    layers = moe_layers(model)
    points = tuple(BudgetPoint((tau,) * len(layers), share, share, 1 - share, 50.0) for tau, share in COSTS.items())
    rule = next(iter(layers.values())).get_gate().config.rule
    return BudgetPath(tuple(layers), rule, "accuracy", True, True, 100, points)


@pytest.fixture
def artifact(tmp_path):
    """Write the artifact of an earlier phase, ReLU and 10 classes, at the stage asked for."""

    def make(stage, activation="relu"):
        path = tmp_path / f"{stage}-{activation}"
        model = digits_source().build(DIGIT_LABELS)
        phases = [FineTuning(source=digits_source(), activation=activation)]
        phases += [ExpertClustering(8)] if stage != "dense" else []
        phases += [RouterRegression(8)] if stage in ("routed", "calibrated") else []
        for phase in phases:
            phase.transform_(model)
            phase.finish_(model)
        records = [PhaseRecord(type(phase).__name__) for phase in phases]
        if stage == "calibrated":
            records.append(PhaseRecord("BudgetCalibration"))
            set_budget_path_(model, budgets_of(model))
        save_artifact(model, path, records)
        return str(path)

    return make
