"""Hugging Face models as the start of a run."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import transformers
from torch import nn

from d2dmoe_pl.adapters._adapter import ModelSource, TaskName
from d2dmoe_pl.adapters._hugging_face import HEADS
from d2dmoe_pl.data.head import VOCABULARY_HEADS
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.errors import check


class HuggingFaceModel(ModelSource):
    """A Hugging Face model with a head for a task, pretrained or from scratch.

    Args:
        task: ``text-classification``, ``text-regression``, ``question-answering``, ``causal-language-modeling``,
            ``masked-language-modeling`` or ``image-classification``; decides the head.
        name: Hub name or folder of a pretrained model. A head of another size is initialised anew. A classifier on a
            decoder without an id for padding takes the one that ends a text.
        config: Configuration of a model to be trained from scratch, e.g. ``transformers.BertConfig``; instead of
            ``name``.
        dtype: Of the weights, whatever they were saved as. Mixed precision is the trainer's ``precision``.

    Raises:
        ConfigError: Unless exactly one of ``name`` and ``config`` is given; to build, if there is no such model, or its
            type has no such head.
    """

    def __init__(
        self,
        task: TaskName,
        name: str | None = None,
        config: transformers.PretrainedConfig | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        check((name is None) != (config is None), f"name={name!r}, config={config!r}: exactly one must be given")
        self.task = task
        self.head, self._auto = HEADS[task]
        self.name = name
        self.config = config
        self.dtype = getattr(torch, dtype)

    def build(self, label_names: Sequence[str]) -> nn.Module:
        config = self._config(label_names)
        if self.name is None:
            return self._auto.from_config(config, dtype=self.dtype)
        return load_pretrained(
            self._auto, self.name, "name", config=config, dtype=self.dtype, ignore_mismatched_sizes=True
        )

    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        with torch.device("meta"):
            return self._auto.from_config(self._config(label_names), dtype=self.dtype)

    def _config(self, label_names: Sequence[str]) -> transformers.PretrainedConfig:
        """The model's configuration, with the head's outputs in it."""
        config = self._pretrained_config() if self.config is None else copy.deepcopy(self.config)
        check(
            type(config) in self._auto._model_mapping,
            f"task={self.task!r}: transformers has no such head for a model of type {config.model_type!r}",
        )
        config.architectures = config.architectures or []  # which of several such classes; transformers takes no None
        if self.head in VOCABULARY_HEADS:
            return config
        config.problem_type = "regression" if self.head == "regression" else None
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}
        if getattr(config, "pad_token_id", None) is None:  # by which a decoder's classifier finds the last token
            config.pad_token_id = _first(getattr(config, "eos_token_id", None))
        return config

    def _pretrained_config(self) -> transformers.PretrainedConfig:
        return load_pretrained(transformers.AutoConfig, str(self.name), "name")


def _first(token_id: int | list[int] | None) -> int | None:
    """Of several ids that end a text, the first."""
    return token_id[0] if isinstance(token_id, list) else token_id
