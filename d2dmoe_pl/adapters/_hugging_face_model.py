"""Hugging Face models as the start of a run."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from torch import nn

from d2dmoe_pl.adapters._adapter import ModelSource, TaskName
from d2dmoe_pl.adapters._hugging_face import outputs_of, text_config
from d2dmoe_pl.adapters._task_heads import HEADS, PROBLEM_TYPES
from d2dmoe_pl.auto_classes import MODEL_TYPE
from d2dmoe_pl.data.embeddings.pooling import check_modules, pooling_of
from d2dmoe_pl.data.head import LABELLED_HEADS, VOCABULARY_HEADS
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.output_names import are_placeholders
from d2dmoe_pl.errors import ConfigError, check, one_line
from d2dmoe_pl.free_memory import check_fits


class HuggingFaceModel(ModelSource):
    """A Hugging Face model with a head for a task, pretrained or from scratch.

    Args:
        task: ``text-classification``, ``text-regression``, ``multi-label-classification``, ``token-classification``,
            ``question-answering``, ``causal-language-modeling``, ``masked-language-modeling``, ``text-to-text``,
            ``embeddings``, ``image-classification`` or ``audio-classification``; decides the head.
        name: Hub name or folder of a pretrained model. A classifier that has been trained on the data's labels keeps
            its head and its order of them; a head for other labels is initialised anew, which ``FineTuning`` trains. A
            classifier on a decoder without an id for padding takes the one that ends a text.
        label_names: What the outputs of the classifier ``name`` stand for, by index, where its own config does not say
            (``LABEL_0``, ...), or says it wrongly.
        config: Configuration of a model to be trained from scratch, e.g. ``transformers.BertConfig``; instead of
            ``name``.
        dtype: Of the weights, whatever they were saved as. Mixed precision is the trainer's ``precision``.
        gguf_file: A GGUF file of llama.cpp in ``name``, which is read dequantised; needs the packages ``gguf`` and
            ``accelerate``.
        dropout: Rate of every dropout in training; if not given, the model's own, but 0 for ``embeddings``: a vector
            that is to be matched has no noise.

    Raises:
        ConfigError: Unless exactly one of ``name`` and ``config`` is given, for ``label_names`` or ``gguf_file``
            without ``name``, or a ``dropout`` outside [0, 1); to build, if there is no such model, its type has no such
            head or no dropout to set, its file has no weights for its layers or cannot be read, or it is larger than
            the memory that is free.
    """

    def __init__(
        self,
        task: TaskName,
        name: str | None = None,
        config: transformers.PretrainedConfig | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        label_names: list[str] | None = None,
        gguf_file: str | None = None,
        dropout: float | None = None,
    ) -> None:
        check((name is None) != (config is None), f"name={name!r}, config={config!r}: exactly one must be given")
        check(
            label_names is None or name is not None,
            f"label_names={label_names}: allowed only with name, since they say what a trained head knows",
        )
        check(
            gguf_file is None or name is not None,
            f"gguf_file={gguf_file!r}: allowed only with name, the folder or hub name that has it",
        )
        check(dropout is None or 0.0 <= dropout < 1.0, f"dropout={dropout}: must lie in [0, 1)")
        self.task = task
        self.head, self._auto = HEADS[task]
        self.name = name
        self.config = config
        self.dtype = getattr(torch, dtype)
        self.label_names = label_names
        self.gguf_file = gguf_file
        self.dropout = dropout

    def output_names(self) -> list[str] | None:
        if self.name is None or self.head not in LABELLED_HEADS:
            return None
        names = outputs_of(self._pretrained_config())
        check(
            self.label_names is None or len(self.label_names) == len(names) == len(set(self.label_names)),
            f"label_names={self.label_names}: must be {len(names)} different names, one for each output of {self.name}",
        )
        return self.label_names or names

    def build(self, label_names: Sequence[str]) -> nn.Module:
        config = self._config(label_names)
        said = "config" if self.name is None else f"name={self.name!r}"
        check_fits(self._structure(config), f"{said}, dtype={str(self.dtype).removeprefix('torch.')!r}")
        if self.name is None:
            return self._auto.from_config(config, dtype=self.dtype)
        loading = {"config": config, "dtype": self.dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
        with _without_report():  # what it says of weights is said here, where it matters
            model, found = load_pretrained(self._auto, self.name, "name", self.gguf_file, **loading)
        absent = set(found["missing_keys"]) | {name for name, *_ in found["mismatched_keys"]}
        fresh = self._new_outputs(model, label_names)
        needed = [name for name in _backbone(model) if "pooler." not in name]  # which heads have, where there are any
        backbone = sorted(absent.intersection(needed))
        if backbone:
            raise ConfigError(
                f"name={self.name!r}: its file has no weights that fit for {len(backbone)} of the "
                f"{len(model.state_dict())} tensors of {type(model).__name__}, e.g. {backbone[0]}; they would be random"
            )
        for name in fresh - absent:
            _reinitialise_(model, name)
        if self.head != "embedding":  # which is none, beside a pooler that it does not use
            self.new_head = ", ".join(sorted(absent | fresh)) or None
        return model

    def _new_outputs(self, model: nn.Module, label_names: Sequence[str]) -> set[str]:
        """The parameters of a trained head whose outputs stand for something else than ``label_names``."""
        outputs = self.output_names()
        if outputs is None or list(label_names) == outputs:
            return set()
        if are_placeholders(outputs) and len(outputs) == len(label_names):
            return set()
        is_output = {name for name, parameter in model.named_parameters() if parameter.shape[0] == len(label_names)}
        return is_output - _backbone(model)

    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        return self._structure(self._config(label_names))

    def _structure(self, config: transformers.PretrainedConfig) -> nn.Module:
        try:
            with torch.device("meta"):
                return self._auto.from_config(copy.deepcopy(config), dtype=self.dtype)
        except ValueError as error:  # of sizes that do not go together
            said = f"config of type {config.model_type!r}" if self.name is None else f"name={self.name!r}"
            raise ConfigError(f"{said}: not what transformers can make ({one_line(str(error))})") from error

    def _config(self, label_names: Sequence[str]) -> transformers.PretrainedConfig:
        """The model's configuration, with the head's outputs in it."""
        config = self._pretrained_config() if self.config is None else copy.deepcopy(self.config)
        check(
            type(config) in self._auto._model_mapping,
            f"task={self.task!r}: transformers has no such head for a model of type {config.model_type!r}",
        )
        if getattr(config, "model_args", None):  # of timm's own files; transformers gives the number of classes itself
            config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
        config.architectures = config.architectures or []  # which of several such classes; transformers takes no None
        if self.dropout is not None:
            check(_set_dropout_(config, self.dropout), f"dropout={self.dropout}: {type(config).__name__} sets none")
        elif self.head == "embedding":
            _set_dropout_(config, 0.0)
        if self.head == "embedding":
            check_modules(self.name or "")
            config.pooling = pooling_of(self.name or "") or "mean"
        if self.head in (*VOCABULARY_HEADS, "embedding"):
            return config
        config.problem_type = PROBLEM_TYPES.get(self.head)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}
        of_text = text_config(config)
        if getattr(of_text, "pad_token_id", None) is None:  # by which a decoder's classifier finds the last token
            of_text.pad_token_id = _first(getattr(of_text, "eos_token_id", None))
        return config

    def _pretrained_config(self) -> transformers.PretrainedConfig:
        config = load_pretrained(transformers.AutoConfig, str(self.name), "name", self.gguf_file)
        check(
            config.model_type != MODEL_TYPE,
            f"name={self.name!r}: is a converted model, which no run begins with; must be a dense one",
        )
        return config


def _set_dropout_(config: transformers.PretrainedConfig, rate: float) -> bool:
    """Have all rates of dropout be ``rate``, those of towers too; whether there were any."""
    found = False
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            found |= _set_dropout_(value, rate)
        elif ("dropout" in key or "pdrop" in key) and type(value) in (int, float):  # None follows another
            setattr(config, key, rate)
            found = True
    return found


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from listing weights that did not fit."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _backbone(model: Any) -> set[str]:
    """The names of the tensors that a pretrained model has without its head."""
    names = set(model.state_dict())
    if model.base_model is not model:
        return {name for name in names if name.startswith(f"{model.base_model_prefix}.")}
    without: Any = transformers.AutoModel  # its parts stand beside the head's, as those of CLIP and Whisper do
    if type(model.config) not in without._model_mapping:
        return names
    with torch.device("meta"):
        parts = dict(without.from_config(copy.deepcopy(model.config)).named_children())
    heads = tuple(f"{name}." for name, _ in model.named_children() if name not in parts)
    return {name for name in names if not name.startswith(heads)}


@torch.no_grad()
def _reinitialise_(model: Any, name: str) -> None:
    """Give the parameter ``name``, and all of its module, the values of a model from scratch."""
    module = model.get_submodule(name.rpartition(".")[0])
    for parameter in module.parameters():
        parameter._is_hf_initialized = False
    module._is_hf_initialized = False
    model._init_weights(module)


def _first(token_id: int | list[int] | None) -> int | None:
    """Of several ids that end a text, the first."""
    return token_id[0] if isinstance(token_id, list) else token_id
