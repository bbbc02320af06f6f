"""What the pages name is there: files, headings, modules, recipes and commands."""

import importlib
import re

import pages
import pytest
from registries import REGISTRIES

from d2dmoe_pl.chain_arguments import chain_parser
from d2dmoe_pl.chain_settings import phase_arguments, split_settings
from d2dmoe_pl.compile_arguments import compile_parser
from d2dmoe_pl.compress_arguments import compress_parser
from d2dmoe_pl.phase_cli import PhaseCLI

EVERY_PAGE = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
SUBCOMMANDS = {"chain", "fit", "validate", "test", "predict", "benchmark", "compile", "compress"}


def test_the_readme_is_short():
    assert pages.README.read_text().count("\n") <= 150


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in pages.anchors(target), link


def test_the_readme_leads_to_every_page():
    linked = {(pages.ROOT / link.partition("#")[0]).resolve() for link in pages.links(pages.README)}
    assert set(pages.PAGES) - {pages.README} <= linked


@EVERY_PAGE
def test_files_that_are_named_are_there(page):
    for path in re.findall(r"`((?:configs|d2dmoe_pl|docs|examples|tests)/[\w./]*)`", page.read_text()):
        assert (pages.ROOT / path).exists(), path


@EVERY_PAGE
def test_modules_that_are_named_are_there(page):
    groups = {registry.group for registry in REGISTRIES}
    if page.name == "CHANGELOG.md":  # which names what there was as well
        return
    for name in set(re.findall(r"\b(d2dmoe_pl(?:\.[A-Za-z_]\w*)+)", page.read_text())) - groups:
        module, attributes = name, []
        while importlib.util.find_spec(module) is None:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
        found = importlib.import_module(module)
        for attribute in attributes:
            found = getattr(found, attribute)


def test_every_recipe_is_listed():
    text = (pages.ROOT / "docs" / "recipes.md").read_text()
    listed = re.findall(r"^\| `configs/(\w+)\.yaml` \|", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(recipe.stem for recipe in (pages.ROOT / "configs").glob("*.yaml"))


@EVERY_PAGE
def test_commands_name_scripts_that_are_there(page):
    for words in pages.commands(page):
        for script in (word for word in words if word.endswith(".py")):
            assert (pages.ROOT / script).is_file(), script


@EVERY_PAGE
def test_phases_are_run_by_commands_that_can_be_parsed(page, tmp_path, monkeypatch):
    if page.name == "extending.md":  # its recipe needs its package; test_extending.py runs the command
        return
    (tmp_path / "configs").symlink_to(pages.ROOT / "configs")
    for source in pages.PAGES:
        pages.write_files(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    for subcommand, *arguments in pages.arguments(page):
        assert subcommand in SUBCOMMANDS
        if subcommand in ("compile", "compress"):
            (compile_parser if subcommand == "compile" else compress_parser)().parse_args(arguments)
        elif subcommand == "chain":
            config = chain_parser().parse_args([word for word in arguments if word != "--print_config"])
            names = list(config.phases)
            settings = split_settings(config.get("set", []), names)
            for index in range(len(names)):
                PhaseCLI(args=phase_arguments(config, settings, index), run=False)
        elif subcommand != "benchmark" and "--run" not in arguments:  # test_command.py, test_run_folders.py have those
            PhaseCLI(args=arguments, run=False)


def test_each_walk_through_the_code_is_short_and_its_files_say_what_they_do():
    text = (pages.ROOT / "docs" / "concepts.md").read_text().partition("## Three walks")[2]
    walks = [re.findall(r"^\d\. `([\w/.]+)`", walk, flags=re.MULTILINE) for walk in text.split("\n### ")[1:]]
    assert len(walks) == 3
    for walk in walks:
        assert 4 <= len(walk) <= 8
        for file in walk:
            first = (pages.ROOT / file).read_text().splitlines()[0]
            assert first.startswith('"""'), file
            assert len(first) > 40, file
