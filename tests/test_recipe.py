"""Recipes are read as they are written, twins over their originals, and none holds a copy of another."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.recipe import SHAPE, is_recipe, merged, phase_config, read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
LONGEST_COPY = 7  # lines; what two recipes happen to have in common where a phase begins
SETTINGS = st.recursive(
    st.none() | st.integers(0, 3),
    lambda part: st.dictionaries(st.sampled_from(["class_path", "a", "b"]), part, max_size=3),
    max_leaves=8,
)
ORIGINAL = """
output_dir: runs/original
seed: 2
shared:
  data: {class_path: Digits, init_args: {batch_size: 8}}
phases:
  first: {model: {class_path: A, init_args: {lr: 1e-3, taus: [1, 2]}}, trainer: {max_epochs: 3}}
  second: {model: {class_path: B}}
  third: {model: {class_path: C}}
"""


@pytest.fixture
def write(tmp_path):
    """Write a file, and give its path."""

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    write("original.yaml", ORIGINAL)
    return write


def test_merging():
    base = {"a": 1, "b": {"c": [1, 2], "d": {"e": 3}}, "f": 4}
    overlay = {"b": {"c": [5], "d": None}, "g": 6}
    assert merged(base, overlay) == {"a": 1, "b": {"c": [5], "d": None}, "f": 4, "g": 6}
    assert merged({"a": 1}, None) is None
    assert merged(1, {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ({"init_args": {"lr": 2}}, {"class_path": "A", "init_args": {"lr": 2, "betas": 0}}),
        ({"class_path": "A", "init_args": {"lr": 2}}, {"class_path": "A", "init_args": {"lr": 2, "betas": 0}}),
        ({"class_path": "B", "init_args": {"lr": 2}}, {"class_path": "B", "init_args": {"lr": 2}}),
    ],
)
def test_another_class_takes_nothing_of_the_first(overlay, expected):
    base = {"class_path": "A", "init_args": {"lr": 1, "betas": 0}}
    assert merged({"model": base}, {"model": overlay}) == {"model": expected}


@given(SETTINGS, SETTINGS)
def test_what_is_laid_over_holds_and_nothing_given_is_changed(base, overlay):
    before = yaml.safe_dump([base, overlay])
    both = merged(base, overlay)
    assert yaml.safe_dump([base, overlay]) == before
    assert merged(both, overlay) == both
    assert merged(base, base) == base


def test_a_recipe_that_extends_none(write):
    recipe = read_recipe(write("recipe.yaml", "phases:\n  b: {model: B, trainer: {max_steps: 1e3}}\n  a: {model: A}\n"))
    assert recipe == {"phases": {"b": {"model": "B", "trainer": {"max_steps": 1000.0}}, "a": {"model": "A"}}}
    assert list(recipe["phases"]) == ["b", "a"]


def test_a_twin_without_phases_has_all_of_the_originals(write):
    twin = read_recipe(write("twin.yaml", "extends: original.yaml\noutput_dir: runs/twin\nshared: {trainer: {a: 1}}"))
    original = read_recipe(write("original.yaml", ORIGINAL))
    shared = {**original["shared"], "trainer": {"a": 1}}
    assert twin == {**original, "output_dir": "runs/twin", "shared": shared}


def test_a_twins_phases_are_in_its_order_over_the_originals(write):
    text = "extends: ../original.yaml\nphases:\n  third:\n  new: {model: {class_path: D}}\n"
    write("folder/twin.yaml", text + "  first: {model: {init_args: {taus: [3]}}}")
    twin = read_recipe(write("folder/of_twin.yaml", "extends: twin.yaml\nphases: {first: , third: }"))["phases"]
    first = {"model": {"class_path": "A", "init_args": {"lr": 0.001, "taus": [3]}}, "trainer": {"max_epochs": 3}}
    assert list(twin.items()) == [("first", first), ("third", {"model": {"class_path": "C"}})]


def test_the_config_of_a_phase(write):
    recipe = read_recipe(
        write("twin.yaml", "extends: original.yaml\nphases: {first: {data: {init_args: {batch_size: 4}}}}")
    )
    assert phase_config(recipe, "first") == {
        "seed_everything": 2,
        "data": {"class_path": "Digits", "init_args": {"batch_size": 4}},
        **read_recipe(write("original.yaml", ORIGINAL))["phases"]["first"],
    }
    with pytest.raises(ConfigError, match=r"^phase='second': allowed are first$"):
        phase_config(recipe, "second")


def test_what_is_a_recipe(write, tmp_path):
    assert is_recipe(write("a.yaml", "extends: original.yaml"))
    assert is_recipe(tmp_path / "original.yaml")
    for plain in ("data: {class_path: Digits}", "- phases", "phases", "", "phases: ["):
        assert not is_recipe(write("a.yaml", plain))
    assert not is_recipe(tmp_path / "nothing.yaml")
    assert not is_recipe('{"phases": {}}' * 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "extends: none.yaml",
            "{file}: extends='none.yaml': no such file; must be a recipe, or the name of one of these: ci",
        ),
        (
            "extends: whole.yaml\nphases: {frist: {model: {init_args: {lr: 1}}}}",
            "{file}: phases.frist: has no model.class_path, which says what it is, and is none of the original",
        ),
        ("extends: [original.yaml]", "{file}: extends=['original.yaml']: must be the file of another recipe"),
        ("extends: twin.yaml", "{file}: extends='twin.yaml': goes round in a ring, {file} -> {file}"),
        ("extends: ring.yaml", "{ring}: extends='twin.yaml': goes round in a ring, {file} -> {ring} -> {file}"),
        ("extends: list.yaml", "{list}: must be a mapping; {SHAPE}"),
        ("- extends", "{file}: must be a mapping; {SHAPE}"),
        ("", "{file}: must be a mapping; {SHAPE}"),
        ("seed: 1", "{file}: phases is missing; {SHAPE}"),
        ("phases:\nseed: 1", "{file}: phases=None: must be a mapping"),
        (
            "phases: {a: {}, trainer: {}}",
            "{file}: phases.trainer: a phase of this name and --set trainer.… of all phases would look the same",
        ),
        ("phases: {a: 3}", "{file}: phases.a=3: must be a mapping or empty"),
        ("extends: original.yaml\nshared: [data]", "{file}: shared=['data']: must be a mapping"),
        ("phases: {a: }\nsead: 1", "{file}: sead: no key of a recipe; allowed are extends, output_dir, seed, shared, "),
        ("phases:\n  a:\n    trainer: {b: 1}\n    trainer: {}", "{file}: trainer: is in line 3 and in line 4"),
        ("phases: [{name: a, config: a.yaml}]", "{file}: recipes are no longer a list of phases with a file each; {S"),
        ("base: base.yaml\nphases: {a: }", "{file}: recipes are no longer a list of phases with a file each; {SHAPE}"),
        ("phases: {a: ", "{file}: is not YAML: while parsing a flow "),
        ("phases: {? [a, b] : {}}", "{file}: line 1: a key is a list or a mapping; must be a word"),
        ("phases:\n  a: &a {trainer: *a}", "{file}: line 2: holds itself, by the name of an anchor in it"),
        ("shared: {trainer: }\nphases: {}", "{file}: shared.trainer=None: must be a mapping, or left out"),
        ("phases:\n  a:\n    trainer:\n", "{file}: phases.a.trainer=None: must be a mapping, or left out"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_key(write, tmp_path, text, message):
    write("ring.yaml", "extends: twin.yaml")
    write("list.yaml", "[1]")
    write("whole.yaml", ORIGINAL)
    file = write("twin.yaml", text)
    with pytest.raises(ConfigError) as raised:
        read_recipe(file)
    names = {"file": file, "ring": tmp_path / "ring.yaml", "list": tmp_path / "list.yaml", "SHAPE": SHAPE, "S": "S"}
    said = str(raised.value)
    assert "\n" not in said
    assert said.startswith(message.removesuffix("{S").format(**names))


@pytest.mark.parametrize("read", [read_recipe, is_recipe])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_recipe_in_another_encoding(tmp_path, read, encoding):
    file = tmp_path / "recipe.yaml"
    file.write_text("phases: {}  # für alle", encoding=encoding)
    with pytest.raises(ConfigError, match=r"recipe\.yaml: is not UTF-8; must be a text file of YAML, saved as UTF-8"):
        read(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as raised:
        read_recipe(tmp_path / "none.yaml")
    assert str(raised.value).startswith(f"{tmp_path / 'none.yaml'}: no such file; must be a recipe, or the name of one")


def statements(file):
    """The lines of a recipe that give a value to something, without comments."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not re.fullmatch(r"\w+:( &\w+)?", line)]


def longest_run(one, other):
    """The most lines that stand in both in a row."""
    longest, before = 0, [0] * (len(other) + 1)
    for line in one:
        now = [0] + [before[i] + 1 if line == same else 0 for i, same in enumerate(other)]
        longest, before = max(longest, *now), now
    return longest


def test_no_two_recipes_hold_copies_of_one_another():
    files = {file.stem: statements(file) for file in RECIPES}
    runs = {pair: longest_run(*(files[name] for name in pair)) for pair in itertools.combinations(files, 2)}
    assert {pair: run for pair, run in runs.items() if run > LONGEST_COPY} == {}


def repeated(base, overlay, key=""):
    """The settings that are given although they would be taken from the original."""
    if not isinstance(base, dict) or not isinstance(overlay, dict):
        return [key] if base == overlay else []
    if merged(base, overlay) is overlay:  # another class
        return []
    return [
        name for part in base.keys() & overlay.keys() for name in repeated(base[part], overlay[part], f"{key}.{part}")
    ]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_twin_says_nothing_that_it_would_take_from_its_original(file):
    twin = yaml.safe_load(file.read_text())
    if "extends" in twin:
        assert repeated(read_recipe(file.parent / twin["extends"]), twin) == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_no_phase_says_what_all_share(file):
    shared, own = read_recipe(file)["shared"], yaml.safe_load(file.read_text())
    for name, phase in own["phases"].items():  # a twin may share what its original says of a phase alone
        assert repeated(shared, phase, name) == []
