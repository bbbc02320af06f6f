"""The package's own names: imported when used, with nothing that they do not need, and without side effects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import d2dmoe_pl

ROOT = Path(__file__).parents[1]
ARTIFACTS = sorted((ROOT / "tests" / "artifacts").iterdir())
# what a user of one line of Python should not have to wait for; torchvision comes with timm
HEAVY = ["datasets", "lightning", "matplotlib", "sklearn", "torchmetrics"]


def fresh(code):
    """What ``code`` prints last in a process of its own, as JSON."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_every_name_is_there():
    assert d2dmoe_pl.__version__ == "0.2.0"
    assert {"load_model", "save_artifact", "convert_to_moe_", "merge_to_dense_", "set_tau_"} < set(d2dmoe_pl.__all__)
    for name in d2dmoe_pl.__all__:
        assert getattr(d2dmoe_pl, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = d2dmoe_pl.no_such_name


def test_importing_the_package_imports_nothing():
    loaded = fresh("import sys, json, d2dmoe_pl; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))")
    assert not {*HEAVY, "numpy", "timm", "torch", "torchvision", "transformers"} & set(loaded)


@pytest.mark.thorough
@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.name)
def test_loading_a_model_imports_its_own_library_alone(path):
    loaded = fresh(
        "import sys, json, d2dmoe_pl\n"
        f"d2dmoe_pl.load_model({str(path)!r})\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    other = "transformers" if path.name.startswith("timm") else "timm"
    assert not {*HEAVY, other} & set(loaded)


@pytest.mark.thorough
def test_importing_everything_changes_nothing_in_the_process():
    """No warning is filtered, no level of a log is set, no variable of the environment, and no GPU is looked for."""
    code = """
import json, logging, os, warnings
import accelerate, datasets, lightning, matplotlib, timm, torch, torchmetrics, transformers, sklearn.datasets
from lightning.pytorch.cli import LightningCLI
import lightning.pytorch.loggers, torch.utils.tensorboard
state = lambda: [
    [str(each) for each in warnings.filters],
    {name: logger.level for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "level")},
    dict(os.environ),
    torch.get_num_threads(),
]
torch.cuda.is_available = None  # to call it would fail
before = state()
import d2dmoe_pl.cli
from d2dmoe_pl import data, adapters, phases
for package in (d2dmoe_pl, data, adapters):
    [getattr(package, name) for name in package.__all__]
after = state()
new = {name: after[1][name] for name, level in before[1].items() if after[1][name] != level}
print(json.dumps([before[0] == after[0], new, before[2] == after[2], before[3] == after[3]]))
"""
    assert fresh(code) == [True, {}, True, True]
