"""A wheel carries all that the package needs, sources of compiled kernels too, and works where no checkout is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = """
import torch
from torch import nn
import d2dmoe_pl
from d2dmoe_pl.adapters import FFN
from d2dmoe_pl.moe.experts.experts import Experts

experts = Experts(FFN("ffn", nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), 4).eval()
tokens = torch.randn(5, 16)
with torch.no_grad():
    torch.testing.assert_close(experts(tokens, torch.ones(5, 4, dtype=torch.bool)), experts(tokens))
print(d2dmoe_pl.__file__)
"""
NAMED = """
from contextlib import suppress
from d2dmoe_pl.entry import main

for recipe in ("digits_vit", "mine.yaml"):
    with suppress(SystemExit):
        main(["chain", "--config", recipe, "--print_config"])
main(["chain", "--config", "digits"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the checkout, with a C++ source and its header among its kernels."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "d2dmoe_pl", source / "d2dmoe_pl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    csrc = source / "d2dmoe_pl" / "moe" / "execution" / "csrc"
    csrc.mkdir(exist_ok=True)
    for name in ("test_only.cpp", "test_only.h"):
        (csrc / name).write_text("// what a kernel is compiled from\n")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*build, "-w", str(folder), str(source)], check=True, capture_output=True, text=True)
    [file] = folder.glob("*.whl")
    return source, file


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    source, file = wheel
    here = {path.relative_to(source).as_posix() for path in (source / "d2dmoe_pl").rglob("*") if path.is_file()}
    here |= {f"d2dmoe_pl/configs/{path.name}" for path in (source / "configs").iterdir()}
    with zipfile.ZipFile(file) as archive:
        assert not [name for name in archive.namelist() if ".data/" in name]  # what lies apart is not always found
        packed = {name for name in archive.namelist() if name.startswith("d2dmoe_pl/")}
    assert {"d2dmoe_pl/moe/execution/csrc/test_only.cpp", "d2dmoe_pl/moe/execution/csrc/test_only.h"} < packed
    assert packed == here


@pytest.mark.thorough
def test_the_recipes_are_found_by_name_where_no_checkout_is(wheel, tmp_path):
    _, file = wheel
    site = tmp_path / "site"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    (tmp_path / "mine.yaml").write_text("extends: digits_vit\noutput_dir: elsewhere\n")
    command = [sys.executable, "-c", NAMED]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    for folder in ("runs/digits_vit", "elsewhere"):
        assert f"output_dir: {folder}" in ran.stdout, ran.stderr
    assert ran.returncode == 2
    assert "digits: no such file; must be a recipe, or the name of one that comes with this: cifar10_vit" in ran.stderr


def test_an_installed_wheel_runs_outside_the_checkout(wheel, tmp_path):
    _, file = wheel
    site = tmp_path / "site"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)  # all that installing it does, but for the script
    for file in site.rglob("test_only.*"):
        file.unlink()  # what the rest is compiled to is at hand
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ran = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert Path(ran.stdout.strip()) == site / "d2dmoe_pl" / "__init__.py"
