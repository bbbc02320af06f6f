"""The package on the page about extending, built from its blocks, installed, and used by name."""

import os
import subprocess
import sys

import pages
import pytest
from registries import REGISTRIES

PAGE = pages.ROOT / "docs" / "extending.md"
NAMES = {
    "d2dmoe_pl.gating": "above_mean",
    "d2dmoe_pl.routers": "linear",
    "d2dmoe_pl.splitting": "norm",
    "d2dmoe_pl.routing": "sentence_hash",
    "d2dmoe_pl.execution": "token_by_token",
    "d2dmoe_pl.adapters": "granite",
}
FIND_AND_RUN = f"""
import sys
from registries import REGISTRIES
from d2dmoe_pl.entry import main

for registry in REGISTRIES:
    found = registry.find({NAMES!r}[registry.group], "name")
    assert found.__module__.startswith("my_experts."), found
main(sys.argv[1:])
"""
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.enable_progress_bar=false",
    "trainer.check_val_every_n_epoch=1",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the recipe, and an environment in which the package is installed."""
    folder = tmp_path_factory.mktemp("extending")
    source, site = folder / "source", folder / "site"
    pages.write_files(PAGE, source)
    (source / "my_experts" / "__init__.py").touch()
    [project] = pages.blocks(PAGE, "toml")
    (source / "pyproject.toml").write_text(project.text)
    (source / "my_experts.yaml").rename(folder / "my_experts.yaml")
    (folder / "configs").symlink_to(pages.ROOT / "configs")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True, capture_output=True, text=True)
    path = os.pathsep.join([str(site), str(pages.ROOT), str(pages.ROOT / "tests")])
    return folder, {**os.environ, "PYTHONPATH": path}


def test_the_table_names_every_kind():
    text = PAGE.read_text()
    assert set(NAMES) == {registry.group for registry in REGISTRIES}
    for registry in REGISTRIES:
        folder = registry.package.replace(".", "/")
        assert f"| `{registry.group}` | `{folder}/` | `{registry.constant}` |" in text


@pytest.mark.thorough
def test_installed_everything_is_found_by_name_and_the_recipe_runs(installed):
    folder, environment = installed
    [arguments] = pages.arguments(PAGE)
    command = [sys.executable, "-c", FIND_AND_RUN, *arguments, "--set", *SMALL]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    assert (folder / "runs" / "my_experts" / "norm_tuning" / "tau_sweep.csv").is_file()
