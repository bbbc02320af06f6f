"""A converted Hugging Face model saves itself as what it is."""

import os
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from d2dmoe_pl.errors import check
from d2dmoe_pl.sharded_tensors import is_sharded
from d2dmoe_pl.whole_files import replace_files


class SavesArtifact:
    """What a converted model has for ``save_pretrained``: an artifact with its experts, routers and gates.

    Args:
        model: The model; once it is dense again, its class's own method is called.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write the model into a folder, and leave what else is there: a Trainer's checkpoints, a tokenizer.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes; of a sharded model every one must call this.
            kwargs: As ``save_pretrained`` takes them; for a dense model only.

        Raises:
            ConfigError: To push to a hub; or for a ``state_dict`` of other values than the model's.
        """
        # what lies to the right of this package; it is there wherever a model has been converted
        artifact = resolve_name("d2dmoe_pl.artifact")
        if not artifact.is_converted(self._model):
            type(self._model).save_pretrained(self._model, save_directory, is_main_process, **kwargs)
            return
        check(
            not kwargs.get("push_to_hub"),
            "push_to_hub=True: must be false for a converted model; upload the folder, or call its push_to_hub",
        )
        of_many = is_sharded(self._model)
        if not of_many:
            _check_own(kwargs.get("state_dict") or {}, self._model.state_dict())
        if not (is_main_process or of_many):
            return
        folder = Path(save_directory).resolve()
        aside = folder / ".artifact"
        artifact.save_artifact(self._model, aside)
        if of_many and torch.distributed.get_rank() > 0:
            return
        weights = (artifact.WEIGHTS, artifact.CONVERTED_WEIGHTS)
        if "state_dict" in kwargs:  # a Trainer saves, which goes on from a file of this name
            for ending in ("", ".index.json"):  # of the weights, or the index of their shards
                if (aside / (artifact.CONVERTED_WEIGHTS + ending)).exists():
                    os.link(aside / (artifact.CONVERTED_WEIGHTS + ending), aside / (artifact.WEIGHTS + ending))
        replace_files(aside, folder, [Path(name).stem for name in weights], last=artifact.CONFIG)


def _check_own(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ``ConfigError`` unless tensors that are to be saved are those of the model, most often its very memory."""
    for name, value in given.items():
        is_own = name in own and (value.shape, value.dtype) == (own[name].shape, own[name].dtype)
        is_same = is_own and (value.data_ptr() == own[name].data_ptr() or torch.equal(value.cpu(), own[name].cpu()))
        check(
            is_same,
            f"state_dict: {name} is not what the model has; must be left out, which saves the model as it is; "
            "other weights must be loaded into it first",
        )
