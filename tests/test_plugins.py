"""Plug-ins of other packages that cannot be used are told by name, with the reason."""

import sys
from importlib.metadata import EntryPoint

import pytest
import tiny

from d2dmoe_pl import plugins
from d2dmoe_pl.adapters import adapter_for, adapter_named, register_adapter
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moe.gating import GateConfig, register_gate

FILE = """
from d2dmoe_pl.adapters import DecoderAdapter, PartNames, adapter_named

def fails():
    raise RuntimeError("own")

class Nameless(DecoderAdapter):
    family = title = "nameless"

class Own(type(adapter_named("llama"))):
    family = "own"
    parts = PartNames(gate_proj="gate", up="up_proj", activation="act_fn", down="down_proj")

NAMELESS, OWN = Nameless(), Own()
"""


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Lets an entry point be there."""
    (tmp_path / "own_plugins.py").write_text(FILE)
    (tmp_path / "own_broken.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    found = plugins._entry_points

    def add(kind, name, value):
        group = f"d2dmoe_pl.{kind}"
        added = {name: [EntryPoint(name, value, group)]}
        monkeypatch.setattr(plugins, "_entry_points", lambda asked: found(asked) | (added if asked == group else {}))

    yield add
    sys.modules.pop("own_plugins", None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("own_broken:rule", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("own_nowhere:rule", "ModuleNotFoundError: No module named 'own_nowhere'"),
        ("own_plugins:rule", "AttributeError: module 'own_plugins' has no attribute 'rule'"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded(entry, value, reason):
    entry("gating", "own", value)
    with pytest.raises(ConfigError) as caught:
        GateConfig("own")
    assert str(caught.value) == f"rule='own': the entry point {value} cannot be loaded ({reason})"


def test_an_adapter_under_another_name_than_its_familys(entry):
    entry("adapters", "other", "own_plugins:OWN")
    with pytest.raises(ConfigError, match=r"^family='other': is the name of an entry point whose adapter is for 'own'"):
        adapter_for(tiny.dense("timm_vit"))


def test_an_adapter_that_lacks_something(entry):
    entry("adapters", "nameless", "own_plugins:NAMELESS")
    with pytest.raises(ConfigError, match=r"^Nameless: has no .*tasks.*, which an adapter must have"):
        adapter_named("nameless")
    with pytest.raises(ConfigError, match=r"^Nameless: has no .*tasks"):
        register_adapter(sys.modules["own_plugins"].NAMELESS)


def test_an_adapter_that_names_a_part_that_is_not_there(entry):
    model = tiny.dense("llama")
    entry("adapters", "own", "own_plugins:OWN")
    with pytest.raises(ConfigError, match=r"^LlamaMLP: has no gate, which Own calls its gate_proj$"):
        select_ffns(model)


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_that_is_none(name):
    with pytest.raises(ConfigError, match=r": must be a text, by which d2dmoe_pl.gating is found$"):
        register_gate(name, lambda scores, tau: scores > tau)
