"""Every phase on a device of its own: nothing of the CPU's is mixed with the model's, as a GPU would not have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.utils.backend_registration", reason="PyTorch has no backends in Python")
SCRIPT = Path(__file__).parents[1] / "pretend_gpu.py"
DONE = {
    "d2dmoe": "FineTuning SparsityEnforcement ExpertClustering RouterRegression StandInFitting RecoveryTuning "
    "BudgetCalibration BudgetDistillation BudgetCalibration",
    "projections": "FineTuning AttentionDistillation SparsityEnforcement ExpertClustering RouterRegression",
    "moefication": "FineTuning ExpertClustering ExpertSelection",
    "moebert": "FineTuning ImportanceScoring MoEBERTDistillation",
}


@pytest.mark.parametrize("chain", DONE)
def test_a_chain(chain):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, SCRIPT, chain]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    refused, *done = ended.stdout.splitlines()
    assert refused == "aten::add: expected all tensors to be on the same device, but found pretend:0 and cpu"
    assert done == [f"{phase}: done" for phase in DONE[chain].split()]
