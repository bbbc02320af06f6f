"""What all Hugging Face families share; each family's own file says where its FFNs are."""

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN

from d2dmoe_pl.adapters.base import Adapter, ModelSource
from d2dmoe_pl.adapters.ffn import FFN
from d2dmoe_pl.data.task import Head
from d2dmoe_pl.errors import check

# what a batch may hold for the model; everything else in it is for losses and metrics
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


class HuggingFaceAdapter(Adapter):
    """A family of ``transformers`` models, told by ``config.model_type``."""

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, transformers.PreTrainedModel) and model.config.model_type == self.family

    def set_activation_(self, model: nn.Module, ffns: Sequence[FFN], name: str) -> None:
        check(name in ACT2FN, f"activation={name!r}: allowed are {', '.join(sorted(ACT2FN))}")
        for ffn in ffns:
            self.put_activation_(model, ffn, ACT2FN[name])
        model.config.hidden_act = name

    @abstractmethod
    def put_activation_(self, model: nn.Module, ffn: FFN, activation: nn.Module) -> None:
        """Replace the activation module of one FFN."""

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._logits(self._call(model, batch))

    def logits_and_hidden_states(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = self._call(model, batch, output_hidden_states=True)
        return self._logits(output), output.hidden_states

    @staticmethod
    def _call(model: nn.Module, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        return model(**{key: batch[key] for key in INPUTS if key in batch}, **kwargs)

    @staticmethod
    def _logits(output: Any) -> Tensor:
        if "start_logits" in output:
            return torch.stack([output.start_logits, output.end_logits], dim=1)  # (B, 2, L)
        return output.logits

    def random_inputs(self, model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
        config = model.config
        if model.main_input_name == "pixel_values":
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            return {"pixel_values": torch.randn(batch_size, config.num_channels, height, width)}
        positions = getattr(config, "max_position_embeddings", length)
        check(length <= positions, f"length={length}: must be at most {positions}, the positions of the model")
        return {"input_ids": torch.randint(config.vocab_size, (batch_size, length))}

    def head(self, model: nn.Module) -> Head:
        if type(model).__name__.endswith("ForQuestionAnswering"):
            return "question-answering"
        return "regression" if model.config.problem_type == "regression" else "classification"

    def num_outputs(self, model: nn.Module) -> int:
        return model.config.num_labels

    def vocabulary_size(self, model: nn.Module) -> int | None:
        return getattr(model.config, "vocab_size", None)

    def config(self, model: nn.Module) -> dict[str, Any]:
        config = json.loads(model.config.to_json_string(use_diff=True))
        return {**config, "architectures": [type(model).__name__]}

    def build(self, folder: Path) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(folder)
        return getattr(transformers, config.architectures[0])(config)


class HuggingFaceModel(ModelSource):
    """A Hugging Face model with a head for a task, pretrained or from scratch.

    Args:
        task: ``text-classification``, ``text-regression``, ``question-answering`` or ``image-classification``; decides
            the head.
        name: Hub name or folder of a pretrained model. A head of another size is initialised anew.
        config: Configuration of a model to be trained from scratch, e.g. ``transformers.BertConfig``; instead of
            ``name``.

    Raises:
        ConfigError: Unless exactly one of ``name`` and ``config`` is given; to build, if the model's type has no such
            head.
    """

    _heads: ClassVar[dict[str, Callable]] = {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "text-regression": transformers.AutoModelForSequenceClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
        "image-classification": transformers.AutoModelForImageClassification,
    }

    def __init__(
        self,
        task: Literal["text-classification", "text-regression", "question-answering", "image-classification"],
        name: str | None = None,
        config: transformers.PretrainedConfig | None = None,
    ) -> None:
        check((name is None) != (config is None), f"name={name!r}, config={config!r}: exactly one must be given")
        self.task = task
        self._head = self._heads[task]
        self._problem_type = "regression" if task == "text-regression" else None
        self.name = name
        self.config = config

    def build(self, label_names: Sequence[str]) -> nn.Module:
        if self.name is None:
            return self._head.from_config(self._labelled(self.config, label_names))
        return self._head.from_pretrained(
            self.name, config=self._labelled(self._pretrained_config(), label_names), ignore_mismatched_sizes=True
        )

    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        config = self._pretrained_config() if self.config is None else self.config
        with torch.device("meta"):
            return self._head.from_config(self._labelled(config, label_names))

    def _pretrained_config(self) -> transformers.PretrainedConfig:
        try:
            return transformers.AutoConfig.from_pretrained(self.name)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            check(False, f"name={self.name!r}: neither a folder nor a reachable hub name of a model ({reason})")
            raise

    def _labelled(
        self, config: transformers.PretrainedConfig, label_names: Sequence[str]
    ) -> transformers.PretrainedConfig:
        check(
            type(config) in self._head._model_mapping,
            f"task={self.task!r}: transformers has no such head for a model of type {config.model_type!r}",
        )
        config = copy.deepcopy(config)
        config.problem_type = self._problem_type
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}
        return config
