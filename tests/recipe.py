"""A recipe of four short phases on digits."""

from pathlib import Path

import yaml

PHASES = ["fine_tuning", "sparsity_enforcement", "expert_clustering", "router_regression"]


def write_recipe(file, epochs=2, **models):
    """Write the recipe; keyword arguments are merged into the ``init_args`` of the phase of that name."""
    shape = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    source = {"class_path": "TimmModel", "init_args": {"architecture": "vit_tiny_patch16_224", **shape}}
    classes = {
        "fine_tuning": ("FineTuning", {"source": source, "activation": "relu"}),
        "sparsity_enforcement": ("SparsityEnforcement", {"penalty": "hoyer", "alpha": 0.001}),
        "expert_clustering": ("ExpertClustering", {"num_experts": 8, "num_samples": 64}),
        "router_regression": ("RouterRegression", {"width": 8}),
    }
    sweep = {"callbacks": [{"class_path": "TauSweep", "init_args": {"taus": [0.5, 0.9, 1.0]}}]}
    phases = {}
    for name, (class_path, init_args) in classes.items():
        trainer = {"max_epochs": epochs, **(sweep if name == "router_regression" else {})}
        model = {"class_path": class_path, "init_args": {**init_args, **models.get(name, {})}}
        phases[name] = {"model": model, "trainer": trainer}
    shared = {
        "data": {"class_path": "Digits", "init_args": {"batch_size": 64}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "limit_train_batches": 6,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    file.write_text(yaml.safe_dump({"shared": shared, "phases": phases}, sort_keys=False))
    return str(file)


def arguments(recipe, output: Path, *more):
    return ["chain", "--config", recipe, "--output_dir", str(output), *more]
