"""How images become model input, in the file that Hugging Face users look for."""

import json
from pathlib import Path


def write_preprocessor_config(
    folder: Path, image_size: int, mean: list[float], std: list[float], rescale_factor: float
) -> None:
    """Write ``preprocessor_config.json`` as ``transformers.AutoImageProcessor`` reads it."""
    config = {
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": rescale_factor,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
