"""Chains of phases on a device that is none: its tensors lie on the CPU, and mix with the CPU's as little as a GPU's.

    python tests/pretend_gpu.py d2dmoe

It renames a backend of PyTorch, for good in its process, so that tests run it in one of its own. What makes tensors out
of lists inside PyTorch, as indexing by a list does, is refused as well, though a GPU would do it.
"""

import csv
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import tiny
import torch
from digits_models import digits_source
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.comparison import Settings
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import DatasetSource, Digits, TextClassification
from d2dmoe_pl.phases import (
    AttentionDistillation,
    BudgetCalibration,
    BudgetDistillation,
    CutoffFitting,
    ExpertClustering,
    ExpertSelection,
    FineTuning,
    ImportanceScoring,
    MoEBERTDistillation,
    Phase,
    RecoveryTuning,
    RouterRegression,
    SparsityEnforcement,
    StandInFitting,
)

NAME = "pretend"
DEVICE = torch.device("cpu")  # until `set_up` has been called
RESHAPING = {f"aten::{name}_" for name in ("squeeze", "unsqueeze", "t", "transpose", "as_strided", "resize")}
TO_AND_FRO = ("aten::copy_", "aten::_to_copy", "aten::index")  # the last takes indices from the CPU


def set_up() -> None:
    global DEVICE
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    DEVICE = torch.device(NAME, 0)


class PretendTensor(torch.Tensor):
    """A tensor on the device, that holds one on the CPU."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, **layout)

    def __init__(self, held):
        self.held = held

    def tolist(self):  # PyTorch refuses that of subclasses
        return self.held.tolist()

    def __repr__(self):
        return f"PretendTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _is_there(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _held(value):
    return value.held if isinstance(value, PretendTensor) else value


def _run(function, args, kwargs):
    """Run an operator on what tensors hold; what it gives is on the device if they, or its ``device``, are."""
    name, given = function._schema.name, list(tree_iter((args, kwargs)))
    there = [value for value in given if isinstance(value, PretendTensor)]
    here = [value for value in given if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor)]
    if there and name not in TO_AND_FRO and any(value.dim() for value in here):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    goes_there = _is_there(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
    own = {**kwargs, **({"device": torch.device("cpu")} if _is_there(kwargs.get("device")) else {})}
    result = function(*tree_map(_held, args), **tree_map(_held, own))
    if name in RESHAPING:
        with no_dispatch():  # what stands around the tensor has its shape as well
            function(*args, **kwargs)
    wrappers = {id(value.held): value for value in there}  # of what was written to

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return wrappers[id(value)] if id(value) in wrappers else PretendTensor(value) if goes_there else value

    return tree_map(wrapped, result)


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Numbers(TorchFunctionMode):
    """What makes tensors of Python's numbers does so past modes for operators."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


class PretendAccelerator(Accelerator):
    def setup_device(self, device):
        assert _is_there(device)

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


def trainer(folder: Path, **settings) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    limits = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 2, "limit_test_batches": 2}
    strategy = SingleDeviceStrategy(device=DEVICE, accelerator=PretendAccelerator())
    logger = TensorBoardLogger(str(folder), name="run", version="")
    # tensors of inference mode have no versions, which those that hold others need
    run = {"strategy": strategy, "devices": 1, "logger": logger, "inference_mode": False}
    return L.Trainer(**{**quiet, **limits, **run, "default_root_dir": folder, **settings})


def run_chain(make_data: Callable, phases: list[tuple[Callable[..., Phase], dict, dict]]) -> None:
    """Fit each phase, from what the one before leaves, and test what it leaves."""
    folder, init_from = Path(tempfile.mkdtemp()), None
    for number, (phase, needed, more) in enumerate(phases):
        place = folder / str(number)
        start = {} if init_from is None else {"init_from": init_from}
        with Numbers(), Operators():
            sweep = [TauSweep(taus=[0.3, 1.0])] if phase in (RouterRegression, RecoveryTuning) else []
            run = trainer(place, callbacks=[SaveArtifact(), *sweep], limit_val_batches=1.0)
            run.fit(phase(**needed, **more, **start), datamodule=make_data())
            init_from = f"{run.log_dir}/artifact"
            trainer(place / "test").test(phase(**needed, init_from=init_from), datamodule=make_data(), verbose=False)
        print(f"{phase.__name__}: done", flush=True)


def texts() -> Callable[[], TextClassification]:
    folder, words = Path(tempfile.mkdtemp()), ["good", "bad", "nice", "ugly", "day", "night"]
    for split in ("train", "validation", "test"):
        with open(folder / f"{split}.csv", "w") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for row in range(48):
                rows.writerow([" ".join(random.choices(words, k=2 + row % 5)), tiny.LABELS[row % 3]])
    tokenizer = tiny.tokenizer(folder / "words", words)
    return lambda: TextClassification(DatasetSource(dataset=str(folder)), tokenizer, max_length=12, batch_size=8)


CALIBRATION = {"num_samples": 16, "num_scored_samples": 16, "num_scored_points": 3}
BERT = {"source": tiny.SOURCES["bert"]()}
CHAINS = {
    "d2dmoe": (
        lambda: lambda: Digits(batch_size=16),
        [
            (FineTuning, {}, {"source": digits_source(), "activation": "relu"}),
            (SparsityEnforcement, {}, {}),
            (ExpertClustering, {"num_experts": 8}, {"num_samples": 32}),
            (RouterRegression, {}, {"width": 8}),
            (CutoffFitting, {}, {"num_tokens": 64}),
            (StandInFitting, {}, {"rank": 2, "num_tokens": 64}),
            (RecoveryTuning, {}, {}),
            (BudgetCalibration, {}, CALIBRATION),
            (BudgetDistillation, {}, {"trains": "model"}),
            (BudgetCalibration, {}, {**CALIBRATION, "estimate": "gradients"}),
        ],
    ),
    "projections": (
        texts,
        [
            (FineTuning, {}, {**BERT, "activation": "relu"}),
            (AttentionDistillation, {}, {}),
            (SparsityEnforcement, {}, {}),
            (ExpertClustering, {"num_experts": 8}, {"num_projection_experts": 4, "num_samples": 32}),
            (RouterRegression, {}, {"width": 8}),
        ],
    ),
    "moefication": (
        texts,
        [
            (FineTuning, {}, {**BERT, "activation": "relu"}),
            (ExpertClustering, {"num_experts": 8}, {"split": "coactivation", "num_samples": 32}),
            (ExpertSelection, {"k": 3}, {"router": "mlp"}),
        ],
    ),
    "moebert": (
        texts,
        [
            (FineTuning, {}, BERT),
            (ImportanceScoring, {}, {}),
            (MoEBERTDistillation, {}, {"num_experts": 4, "expert_dim": 12, "num_shared": 5, "routing": "gate_token"}),
        ],
    ),
}


def run_benchmark() -> None:
    """Score and call a whole model beside its dense twin, as they are timed."""
    folder, types = tempfile.mkdtemp(), [torch.float32, torch.bfloat16]
    save_artifact(tiny.routed("bert"), folder)
    settings = Settings(["model"], types, [2], "reference", [], 2, DEVICE, scored_samples=20)
    with Numbers(), Operators(), torch.no_grad():
        for comparison in artifact_comparisons(folder, [0.3, 1.0], tiny.TextData(), 6, settings):
            comparison.dense.call()
            for way in comparison.ways:
                with way.contender.setting():
                    way.contender.call()
    print("benchmark: done", flush=True)


def main(name: str) -> None:
    torch.manual_seed(0)
    random.seed(0)
    set_up()
    with Numbers(), Operators():
        try:
            torch.ones(2, device=DEVICE) + torch.ones(2)
        except RuntimeError as error:
            print(error)
    if name == "benchmark":
        run_benchmark()
        return
    make_data, phases = CHAINS[name]
    run_chain(make_data(), phases)


if __name__ == "__main__":
    main(sys.argv[1])
