"""The examples in docstrings run, each as it would on its own."""

import doctest
import importlib
import pkgutil

import pytest

import d2dmoe_pl
from d2dmoe_pl.plugins import Plugins

MODULES = [
    module.name
    for module in pkgutil.walk_packages(d2dmoe_pl.__path__, "d2dmoe_pl.")
    if not module.name.endswith(".triton")
]


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        for found in finder.find(importlib.import_module(name), name, globs={}):
            if found.examples:
                compiles = found.name.endswith(".save_compiled")
                yield pytest.param(found, id=found.name, marks=pytest.mark.thorough if compiles else ())


@pytest.fixture(autouse=True)
def _registries_as_they_were(monkeypatch):
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, Plugins):
                monkeypatch.setattr(value, "_registered", dict(value._registered))


@pytest.mark.parametrize("example", list(examples()))
def test_example(example):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said = []
    runner.run(example, out=said.append, clear_globs=True)
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("name", [name for name in d2dmoe_pl.__all__ if name[0].islower()])
def test_public_functions_have_an_example(name):
    assert ">>> " in (getattr(d2dmoe_pl, name).__doc__ or ""), name
