"""Recipes: a chain in one YAML file, what its phases share said once; a twin says what differs from its original."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from d2dmoe_pl.errors import ConfigError, check

# `from` and `set` are of one run rather than of a recipe, but `chain --print_config` prints them where they are given
LONGEST_PATH = 1000
PARTS = ("trainer", "data", "model")  # of what a phase takes
KEYS = ("extends", "output_dir", "seed", "shared", "phases", "from", "set")
SHAPE = "a recipe is one file: shared, what every phase takes, and phases, from each phase's name to what else it takes"


def merged(base: Any, overlay: Any) -> Any:
    """One setting over another: mappings key by key, other values in the place of what was there.

    Settings of one class mean nothing to another, so a mapping with another ``class_path`` (as it is written) replaces
    the one below it whole.

    Args:
        base: What holds where ``overlay`` says nothing.
        overlay: What is said anew.

    Returns:
        A new mapping, or ``overlay`` itself where either is none.
    """
    if not isinstance(base, Mapping) or not isinstance(overlay, Mapping):
        return overlay
    if "class_path" in base and overlay.get("class_path", base["class_path"]) != base["class_path"]:
        return overlay
    return {**base, **{key: merged(base[key], value) if key in base else value for key, value in overlay.items()}}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: from a checkout, or from the package as a wheel installs it."""
    here = Path(__file__).parent
    folder = next((each for each in (here / "configs", here.parent / "configs") if each.is_dir()), here)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe_file(path: str | os.PathLike) -> Path:
    """The file of a recipe: ``path`` itself, or a recipe of that name that comes with the package.

    Args:
        path: A file; or, where there is none, a name such as ``digits_vit`` or ``configs/digits_vit.yaml``.
    """
    file = Path(path)
    is_name = file.parent in (Path(), Path("configs")) and file.suffix in ("", ".yaml")
    return shipped_recipes().get(file.stem, file) if is_name and not os.path.isfile(path) else file


def is_recipe(path: str | os.PathLike) -> bool:
    """Whether a file holds a recipe, and not the YAML that ``fit`` takes; False where there is no such file."""
    if len(str(path)) > LONGEST_PATH or not os.path.isfile(recipe_file(path)):  # a whole config in the place of a path
        return False
    try:
        content = _load(_text(recipe_file(path)))
    except yaml.YAMLError:  # for the parser to report
        return False
    return isinstance(content, dict) and any(key in content for key in ("extends", "shared", "phases"))


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """A recipe with all that it takes from those that it extends.

    A twin's ``phases`` are in its own order and leave out those that it does not name; each is merged over the
    original's of that name, and an empty one is as in the original.

    Args:
        path: YAML file; what it ``extends`` is relative to it.

    Returns:
        The recipe without ``extends``, ``phases`` from each one's name to a mapping.

    Raises:
        ConfigError: For a file that is not there or holds no recipe, and for recipes that extend one another in a ring.
    """
    return _read(recipe_file(path), ())


def check_phase_name(name: str, where: str) -> None:
    """Raise ``ConfigError`` if a setting of this phase, which ``where`` names, would look like one of all phases."""
    check(name not in PARTS, f"{where}: a phase of this name and --set {name}.… of all phases would look the same")


def phase_config(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What ``fit`` takes for one phase of a recipe.

    Args:
        recipe: As :func:`read_recipe` returns it.
        name: Of the phase.

    Returns:
        The seed, and what all phases share with the phase's own settings merged over it.

    Raises:
        ConfigError: If the recipe has no such phase.
    """
    phases = recipe["phases"]
    check(name in phases, f"phase={name!r}: allowed are {', '.join(phases)}")
    return merged({"seed_everything": recipe.get("seed", 0), **recipe.get("shared", {})}, phases[name])


def _read(file: Path, twins: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe in ``file``, which ``twins`` extend, each the one after it."""
    names = ", ".join(shipped_recipes())
    check(file.is_file(), f"{file}: no such file; must be a recipe, or the name of one that comes with this: {names}")
    recipe = _content(file)
    _check_shape(recipe, file)
    if "extends" not in recipe:
        check("phases" in recipe, f"{file}: phases is missing; {SHAPE}")
        return _over({"phases": {}}, recipe)
    extends = recipe.pop("extends")
    original, files = _original(file, extends), (*twins, file)
    names = ", ".join(shipped_recipes())
    check(
        original.is_file(),
        f"{file}: extends={extends!r}: no such file; must be a recipe, or the name of one of these: {names}",
    )
    ring = " -> ".join(map(str, (*files, original)))
    known = [each.resolve() for each in files]
    check(original.resolve() not in known, f"{file}: extends={extends!r}: goes round in a ring, {ring}")
    before = _read(original, files)
    whole = _over(before, recipe)
    if not twins:  # what they extend may leave it to them
        _check_phases(whole, before["phases"], file)
    return whole


def _original(file: Path, extends: str) -> Path:
    """What a recipe extends, relative to it; or a recipe that comes with the package."""
    beside = file.parent / extends
    return beside if beside.is_file() else recipe_file(extends) if recipe_file(extends).is_file() else beside


def _over(original: Mapping[str, Any], twin: Mapping[str, Any]) -> dict[str, Any]:
    recipe = merged(original, twin)
    if "phases" in twin:
        before = original["phases"]
        recipe["phases"] = {name: merged(before.get(name, {}), phase or {}) for name, phase in twin["phases"].items()}
    return recipe


def _check_phases(recipe: Mapping[str, Any], before: Collection[str], file: Path) -> None:
    """Raise ``ConfigError`` for a phase that neither says what it is nor is one of the original's."""
    for name, phase in recipe["phases"].items():
        model = merged(recipe.get("shared", {}), phase or {}).get("model")
        named = isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)
        check(
            name in before or named,
            f"{file}: phases.{name}: has no model.class_path, which says what it is, and is none of the original's: "
            f"{', '.join(before)}",
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8; must be a text file of YAML, saved as UTF-8") from error


def _content(file: Path) -> Any:
    text = _text(file)
    try:
        _check_keys(yaml.compose(text), file)
        return _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error


def _check_keys(node: yaml.Node | None, file: Path, around: tuple[yaml.Node, ...] = ()) -> None:
    """Refuse a key that stands twice in a mapping, whose first YAML would drop without a word, or that is no word."""
    if node is None:
        return
    begins = node.start_mark.line + 1
    is_inside = any(node is each for each in around)
    check(not is_inside, f"{file}: line {begins}: holds itself, by the name of an anchor in it")
    around = (*around, node)
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            is_word = isinstance(key, yaml.ScalarNode)
            check(is_word, f"{file}: line {line}: a key is a list or a mapping; must be a word")
            check(key.value not in lines, f"{file}: {key.value}: is in line {lines.get(key.value)} and in line {line}")
            lines[key.value] = line
            _check_keys(value, file, around)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, file, around)


def _check_shape(recipe: Any, file: Path) -> None:
    check(isinstance(recipe, dict), f"{file}: must be a mapping; {SHAPE}")
    old = "base" in recipe or isinstance(recipe.get("phases"), list)
    check(not old, f"{file}: recipes are no longer a list of phases with a file each; {SHAPE}")
    for key in recipe:
        check(key in KEYS, f"{file}: {key}: no key of a recipe; allowed are {', '.join(KEYS)}")
    extends = recipe.get("extends", "")
    check(isinstance(extends, str), f"{file}: extends={extends!r}: must be the file of another recipe")
    for key in ("shared", "phases"):
        part = recipe.get(key, {})
        check(isinstance(part, dict), f"{file}: {key}={part!r}: must be a mapping")
    for name, phase in recipe.get("phases", {}).items():
        check_phase_name(name, f"{file}: phases.{name}")
        check(phase is None or isinstance(phase, dict), f"{file}: phases.{name}={phase!r}: must be a mapping or empty")
        _check_trainer(phase or {}, f"{file}: phases.{name}")
    _check_trainer(recipe.get("shared", {}), f"{file}: shared")


def _check_trainer(part: Mapping[str, Any], where: str) -> None:
    """Refuse what YAML makes of ``trainer:`` with nothing below it."""
    check(part.get("trainer", {}) is not None, f"{where}.trainer=None: must be a mapping, or left out")


def _load(text: str) -> Any:
    """YAML as the command line reads it, e.g. 1e-3 as a number."""
    return get_loader("yaml")(text)
