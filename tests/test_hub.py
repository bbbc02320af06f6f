"""An artifact on the hub, with a card; the hub is a folder here."""

import shutil

import huggingface_hub
import pytest
import tiny
import torch

from d2dmoe_pl import load_model, push_to_hub
from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.hub import model_card
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_, set_taus_
from d2dmoe_pl.moe.find_layers import moe_layers

HISTORY = [
    PhaseRecord("FineTuning", {"test/accuracy": 0.925}),
    PhaseRecord("RouterRegression", {"test/accuracy": 0.9, "test/loss": 0.3}),
]


@pytest.fixture
def artifact(tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "run" / "artifact", HISTORY)
    rows = "stage,tau,accuracy,experts_percent,ffn_flops_percent,experts_percent/a\ntest,0.5,91.25,12.5,14.0,3\n"
    (tmp_path / "run" / "tau_sweep.csv").write_text(rows)
    return tmp_path / "run" / "artifact"


def test_a_card_states_method_cost_and_accuracy(artifact):
    card = model_card(read_artifact(artifact), "me/cheaper")
    for text in (
        "# cheaper\n",
        "made by D2DMoE ([arXiv 2310.04361]",
        "FineTuning, RouterRegression.",
        "2 layers of 8 experts",
        "| FineTuning | 0.9250 |  |",
        "| RouterRegression | 0.9000 | 0.3000 |",
        "| stage | tau | accuracy | experts_percent | ffn_flops_percent |",
        "| test | 0.5 | 91.25 | 12.5 | 14 |",
        "model = load_model('me/cheaper')\nset_tau_(model, 0.9)  # if it is to be another",
        "By the rule dynk_max, it is set to `tau` 0.5.\n",
    ):
        assert text in card
    assert model_card(read_artifact(artifact), "x").startswith("---\nlibrary_name: d2dmoe_pl\n")


def test_what_is_pushed_is_what_is_loaded(artifact, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("me/cheaper", True, True)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision: tmp_path / "hub" / name)
    assert push_to_hub(artifact, "me/cheaper", private=True, token="secret") == "https://hub/me/cheaper"
    batch = tiny.batch("bert")
    with torch.no_grad():
        expected, found = (tiny.logits(load_model(path), batch) for path in (artifact, "me/cheaper"))
    assert torch.equal(expected, found)
    assert not (artifact / "README.md").exists()
    assert "## Cost" in (tmp_path / "hub" / "me" / "cheaper" / "README.md").read_text()


def test_what_is_no_artifact_is_not_pushed(tmp_path):
    with pytest.raises(ConfigError, match=r"path='.*': no artifact"):
        push_to_hub(tmp_path, "me/cheaper")


def test_a_card_of_a_compressed_model_has_what_was_measured_of_it(tmp_path):
    model = tiny.routed("bert")
    points = (BudgetPoint((1.0, 1.0), 1.0, 1.0, 0.0, 90.0), BudgetPoint((0.4, 0.2), 0.3, 0.4, 0.1, 85.0))
    set_budget_path_(model, BudgetPath(tuple(moe_layers(model)), "dynk_max", "accuracy", True, True, 100, points))
    set_taus_(model, BudgetPath(tuple(moe_layers(model)), "dynk_max", "accuracy", True, True, 100, points), (0.4, 0.2))
    save_artifact(model, tmp_path / "model", [PhaseRecord("RouterRegression"), PhaseRecord("BudgetCalibration")])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "tau_sweep.csv").write_text("stage,budget,accuracy\ntest,0.3,84.5\n")
    card = model_card(read_artifact(tmp_path / "model"), "me/cheaper")
    for text in (
        "| test | 0.3 | 84.5 |",
        "By the rule dynk_max, it is set to `tau` 0.4, 0.2, by layer.\n",
        "set_budget_(model, ffn_flops=0.3)  # if it is to be another; 30% is the least",
    ):
        assert text in card
