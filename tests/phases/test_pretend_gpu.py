"""Every phase on a device of its own: nothing of the CPU's is mixed with the model's, as a GPU would not have it."""

from pathlib import Path

import forked_commands
import pytest

pytest.importorskip("torch.utils.backend_registration", reason="PyTorch has no backends in Python")
SCRIPT = Path(__file__).parents[1] / "pretend_gpu.py"
DONE = {
    "d2dmoe": "FineTuning SparsityEnforcement ExpertClustering RouterRegression CutoffFitting StandInFitting "
    "RecoveryTuning BudgetCalibration BudgetDistillation BudgetCalibration",
    "projections": "FineTuning AttentionDistillation SparsityEnforcement ExpertClustering RouterRegression",
    "moefication": "FineTuning ExpertClustering ExpertSelection",
    "moebert": "FineTuning ImportanceScoring MoEBERTDistillation",
    "benchmark": "benchmark",
}


@pytest.mark.thorough
@pytest.mark.parametrize("chain", DONE)
def test_a_chain(chain):
    ended = forked_commands.run([chain], script=str(SCRIPT))
    assert ended.returncode == 0, ended.stderr[-3000:]
    refused, *done = ended.stdout.splitlines()
    assert refused == "aten::add: expected all tensors to be on the same device, but found pretend:0 and cpu"
    assert done == [f"{phase}: done" for phase in DONE[chain].split()]
