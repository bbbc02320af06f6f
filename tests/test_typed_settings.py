"""Settings made in Python with values of other types are told in the words of a wrong setting, whichever they are."""

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from d2dmoe_pl.data import Augmentation, DatasetSource
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.activations import ActivationConfig
from d2dmoe_pl.moe.conversion import ExpertsConfig
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.projections import ProjectionConfig
from d2dmoe_pl.moe.quantization.quantize import QuantizationConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moe.stand_ins.fitting import FittingConfig
from d2dmoe_pl.moe.stand_ins.stand_in import StandInConfig
from d2dmoe_pl.moebert.layer import MoEBERTConfig

CONFIGS = [
    ActivationConfig,
    Augmentation,
    CutoffConfig,
    DatasetSource,
    ExpertsConfig,
    FittingConfig,
    GateConfig,
    MoEBERTConfig,
    ProjectionConfig,
    QuantizationConfig,
    RouterConfig,
    StandInConfig,
]
FIELDS = [(config, field.name) for config in CONFIGS for field in fields(config)]
WRONG = ["8", 1.5, None, [1], ["a"], True, {"a": 1}, object(), torch.ones(2), np.ones(2)]


def told(config, name, value):
    """What is said of a value of a field, nothing where it is taken."""
    needed = {field.name: 8 for field in fields(config) if field.default is field.default_factory is MISSING}
    try:
        config(**{**needed, name: value})
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_whatever_a_field_is_given_it_is_taken_or_told(config, name):
    lines = [line for line in (told(config, name, value) for value in WRONG) if line]
    assert len(lines) >= len(WRONG) - 3
    for line in lines:
        assert line.startswith("router=" if line.startswith("router=") and name == "kind" else f"{name}=")
        assert "must " in line or "allowed " in line


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: ExpertsConfig(num_experts="8"), "num_experts='8': has the type str; must be int"),
        (lambda: ExpertsConfig(8, True), "num_projection_experts=True: has the type bool; must be int or None"),
        (lambda: RouterConfig(width=1.5), "width=1.5: has the type float; must be int"),
        (lambda: ProjectionConfig(residual="yes"), "residual='yes': has the type str; must be bool"),
        (lambda: FittingConfig(taus=("0.5",)), "taus=('0.5',): has the type tuple; must be tuple of float"),
        (
            lambda: DatasetSource(train="a.csv", more={"test_a": 1}),
            "more={'test_a': 1}: has the type dict; must be dict of str to str",
        ),
        (lambda: GateConfig("dynk_max", tau="0.5"), "tau='0.5': must lie in [0, 1] (1 runs every expert, the dense "),
    ],
)
def test_the_line(make, line):
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value).startswith(line)


def test_numbers_of_other_libraries_are_numbers_that_files_can_hold():
    experts = ExpertsConfig(np.int64(8), torch.tensor(4))
    cutoffs = CutoffConfig(np.float32(0.5), torch.tensor(0.25), 0, np.int64(1), [np.float32(0.5), 1, torch.tensor(1)])
    assert json.loads(json.dumps(asdict(experts))) == {"num_experts": 8, "num_projection_experts": 4}
    assert json.loads(json.dumps(asdict(cutoffs))) == {
        "inputs": 0.5,
        "hidden": 0.25,
        "full_tau": 0,
        "gate_proj": 1,
        "halfway": [0.5, 1, 1],
    }
    assert FittingConfig(taus=[np.float64(0.5), 1]).taus == [0.5, 1]
    assert DatasetSource(train=Path("data") / "train.csv").train == str(Path("data") / "train.csv")
