"""The Python on the pages runs."""

import pages
import pytest
import tiny
from registries import REGISTRIES

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_
from d2dmoe_pl.moe.find_layers import moe_layers

WITH_PYTHON = [page for page in pages.PAGES if pages.blocks(page, "python")]
NOT_RUN = "# not run by the tests"  # the first line of a block that needs more than this project


def _case(page):
    compiles = page.stem == "speed"  # which takes most of a minute, and is tested by itself
    return pytest.param(page, marks=[pytest.mark.thorough] if compiles else [])


@pytest.fixture
def _own_registries(monkeypatch):
    """What is registered here is forgotten afterwards."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.usefixtures("_own_registries")
@pytest.mark.parametrize("page", [_case(page) for page in WITH_PYTHON], ids=pages.name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """All of a page's blocks, one after the other in one namespace, in a folder with what the default chain leaves."""
    monkeypatch.chdir(tmp_path)
    model = tiny.routed()
    save_artifact(model, tmp_path / "runs" / "digits_vit" / "router_regression" / "artifact")
    points = tuple(BudgetPoint((tau,) * 2, cost, cost, 0.0, 90.0) for tau, cost in ((1.0, 1.1), (0.0, 0.1)))
    names = tuple(moe_layers(model))
    set_budget_path_(model, BudgetPath(names, "dynk_max", "accuracy", True, True, samples=150, points=points))
    save_artifact(model, tmp_path / "runs" / "digits_vit" / "budget_calibration" / "artifact")
    namespace = {"__name__": page.stem}
    for block in pages.blocks(page, "python"):
        if not block.text.startswith(NOT_RUN):
            code = "\n" * (block.line - 1) + block.text  # so that a traceback has the page's lines
            exec(compile(code, page, "exec"), namespace)
    for registry in REGISTRIES:  # what a file inside the package has to have
        if registry.constant in namespace:
            assert registry.fits(namespace[registry.constant]), registry.constant


def test_nearly_all_of_the_python_runs():
    found = [block.text for page in WITH_PYTHON for block in pages.blocks(page, "python")]
    assert sum(text.startswith(NOT_RUN) for text in found) <= 2
