"""A finished model on the Hugging Face hub, with a card that says how it was made, what it costs and how good it is."""

import csv
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from d2dmoe_pl.artifact import read_artifact
from d2dmoe_pl.artifact_parts import Artifact

CARD = "README.md"
SWEEP = "tau_sweep.csv"  # beside an artifact, where a run has made one
EVALUATION = "evaluation"  # where ``compress`` leaves what it measured of the model that is set to a wish
METHODS = {
    "MoEBERTDistillation": "MoEBERT ([arXiv 2204.07675](https://arxiv.org/abs/2204.07675))",
    "ExpertSelection": "MoEfication ([arXiv 2110.01786](https://arxiv.org/abs/2110.01786))",
    "RouterRegression": "D2DMoE ([arXiv 2310.04361](https://arxiv.org/abs/2310.04361))",
}


def push_to_hub(path: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload an artifact, with a model card, to the Hugging Face hub, from where ``load_model(repo_id)`` takes it.

    Args:
        path: The artifact that a phase, or :func:`save_artifact`, wrote.
        repo_id: ``organisation/name``; made if it is not there.
        private: Whether a new one is seen by its owner alone.
        token: Of the hub; that of ``hf auth login`` if not given.

    Returns:
        The address of what was uploaded.

    Raises:
        ConfigError: If ``path`` is no whole artifact.

    Example:
        >>> from d2dmoe_pl import push_to_hub
        >>> push_to_hub("runs/minilm_emotion/recovery_tuning/artifact", "me/minilm-emotion-moe")  # doctest: +SKIP
    """
    artifact = read_artifact(path, "path")
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(artifact.path, Path(folder) / "artifact"))
        if not (copy / CARD).exists():
            (copy / CARD).write_text(model_card(artifact, repo_id), encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=copy, commit_message="Upload a model of d2dmoe_pl"))


def model_card(artifact: Artifact, repo_id: str) -> str:
    """What a model's page on the hub says: method, cost and accuracy as they were recorded, and how to load it.

    Args:
        artifact: The model's description.
        repo_id: Where it is to be.
    """
    phases = [record.phase for record in artifact.history]
    method = next((METHODS[phase] for phase in reversed(phases) if phase in METHODS), None)
    made = f"by {method}" if method else "with d2dmoe_pl"
    kinds = sorted({f"{made['num_experts']} experts" for made in artifact.layers.values()})
    layers = f"{len(artifact.layers)} layers of {' or '.join(kinds)}" if kinds else "dense FFNs"
    metrics = list(dict.fromkeys(name for record in artifact.history for name in record.metrics))
    rows = [
        [record.phase, *(f"{record.metrics[name]:.4f}" if name in record.metrics else "" for name in metrics)]
        for record in artifact.history
    ]
    parts = [
        "---\nlibrary_name: d2dmoe_pl\ntags: [mixture-of-experts, d2dmoe]\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"A model of the family {artifact.family}, at stage {artifact.stage}, {layers}: made {made}, in the phases "
        f"{', '.join(phases)}.",
        _how_to_load(artifact, repo_id),
        *_setting(artifact),
        "## Accuracy after each phase",
        _table(["phase", *metrics], rows),
        *_costs(artifact),
    ]
    return "\n\n".join(parts) + "\n"


def _how_to_load(artifact: Artifact, repo_id: str) -> str:
    names, setting = "load_model", ""
    if artifact.budgets is not None:
        share = artifact.budgets.points[-1].ffn_flops
        names = "load_model, set_budget_"
        told = max(0.25, math.ceil(1000 * share) / 1000)
        setting = f"\nset_budget_(model, ffn_flops={told:g})  # if it is to be another; {100 * share:.2g}% is the least"
    elif any((made.get("gate") or {}).get("tau") is not None for made in artifact.layers.values()):
        names, setting = "load_model, set_tau_", "\nset_tau_(model, 0.9)  # if it is to be another"
    return f"```python\nfrom d2dmoe_pl import {names}\n\nmodel = load_model({repo_id!r}){setting}\n```"


def _setting(artifact: Artifact) -> list[str]:
    """What its gates are set to."""
    gates = [made["gate"] for made in artifact.layers.values() if made.get("gate")]
    told = []
    for key in ("tau", "k"):
        values = [f"{gate[key]:.4g}" for gate in gates if gate[key] is not None]
        if values:
            told.append(f"`{key}` {values[0]}" if len(set(values)) == 1 else f"`{key}` {', '.join(values)}, by layer")
    rules = " and ".join(dict.fromkeys(gate["rule"] for gate in gates))
    return [f"By the rule {rules}, it is set to {' and '.join(told)}."] if told else []


def _costs(artifact: Artifact) -> list[str]:
    """What was measured at each setting of the gate, where the run has left it beside the artifact."""
    beside = (artifact.path.parent / SWEEP, artifact.path.parent / EVALUATION / SWEEP)  # the latter of ``compress``
    file = next((file for file in beside if file.is_file()), None)
    if file is None:
        return []
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    columns = [name for name in rows[0] if not name.startswith("experts_percent/")] if rows else []
    shown = [[_rounded(row[name]) for name in columns] for row in rows]
    heading = (
        "## Cost\n\nFLOPs count a multiply-add as 2, routers in, padding out; `model_flops`: of a sample. Scores that "
        "are shares are in percent, where those above are fractions."
    )
    return [heading, _table(columns, shown)]


def _rounded(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
