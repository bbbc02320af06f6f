"""A converted Hugging Face model saves itself as what it is."""

import os
import shutil
from pathlib import Path
from pkgutil import resolve_name
from typing import Any


class SavesArtifact:
    """What a converted model has for ``save_pretrained``: an artifact with its experts, routers and gates.

    Args:
        model: The model; once it is dense again, its class's own method is called.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the model into a folder, and leave the files of others that are there.

        Args:
            save_directory: The folder.
            kwargs: As ``save_pretrained`` takes them; for a dense model only.
        """
        # what lies to the right of this package; it is there wherever a model has been converted
        artifact = resolve_name("d2dmoe_pl.artifact")
        if not artifact.is_converted(self._model):
            type(self._model).save_pretrained(self._model, save_directory, **kwargs)
            return
        folder = Path(save_directory)

        def keep_others(aside: Path) -> None:
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.is_file() and file.suffix != ".safetensors":
                    shutil.copy(file, aside / file.name)

        artifact.save_artifact(self._model, folder, save_processor=keep_others)
        if "state_dict" in kwargs:  # a Trainer saves, which goes on from a file of this name
            for ending in ("", ".index.json"):  # of the weights, or the index of their shards
                if (folder / (artifact.CONVERTED_WEIGHTS + ending)).exists():
                    os.link(folder / (artifact.CONVERTED_WEIGHTS + ending), folder / (artifact.WEIGHTS + ending))
