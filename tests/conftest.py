"""Tests run offline, in temporary folders, on tiny random models."""

import os
import warnings

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run beside tests, and have no processors to spare
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch does not do by itself

import datasets
import lightning as L
import tiny
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from d2dmoe_pl import save_artifact
from d2dmoe_pl.cli import main
from d2dmoe_pl.data import Digits


def pytest_collection_modifyitems(items):
    """The longest come first, so that no worker waits for the last one of another."""
    items.sort(key=lambda item: item.path.name != "test_kills.py")


@pytest.fixture(scope="session", autouse=True)
def _own_dataset_cache(tmp_path_factory):
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.fixture(scope="module", autouse=True)
def _pictures_are_left_blank(request):
    """Filling them with ink takes a third of a short chain; files with tests of pictures are marked to have them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("drawn") is None:
            patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield


@pytest.fixture
def trainer(tmp_path):
    """Make trainers that write to a temporary folder and do little."""

    def make(**kwargs):
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "limit_train_batches": 4,
            "limit_val_batches": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": TensorBoardLogger(tmp_path, name="run", version=""),
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**settings, **kwargs})

    return make


@pytest.fixture
def digits():
    return Digits(batch_size=16)


@pytest.fixture(scope="session")
def compiled_folders(tmp_path_factory):
    """An artifact, and what ``compile`` made of it, which takes a while."""
    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(36)]
    model = tiny.routed("bert", tau=0.5).eval()
    save_artifact(model, folder / "before", save_processor=lambda aside: tiny.tokenizer(aside, words))
    main(["compile", "--artifact", str(folder / "before"), "--output_dir", str(folder / "after"), "--tau", "0.4"])
    return folder / "before", folder / "after"
