"""A working folder with texts and a classifier, as it is and where ``compress`` has run."""

import shutil

import pytest
import stand_ins

from d2dmoe_pl.cli import main


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with texts and a classifier that has been trained on their labels."""
    monkeypatch.chdir(tmp_path)
    stand_ins.write_classifier(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which the command has run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stand_ins.write_classifier(folder)
        main(["compress", "--model", "model", "--data", "texts", "--output_dir", "out", "--target", "flops=90%"])
    return folder


@pytest.fixture
def calibrated(place, finished):
    """A working folder in which the command has run."""
    shutil.copytree(finished, place, dirs_exist_ok=True)
    return place
