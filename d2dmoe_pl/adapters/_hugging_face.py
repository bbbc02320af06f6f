"""What all Hugging Face families share; each family's own file says where its FFNs are."""

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from d2dmoe_pl.adapters._adapter import KEY, MASK, Adapter, check_of_library, place_meta_buffers_
from d2dmoe_pl.adapters._attention import plain_linear
from d2dmoe_pl.adapters._exact_buffers import exact_buffers
from d2dmoe_pl.adapters._ffn import FFN, TransposedLinear
from d2dmoe_pl.adapters._generation import GetsStoppingCriteria, PreparesInputs
from d2dmoe_pl.adapters._padding import padded_behind
from d2dmoe_pl.adapters._saved_as_artifact import SavesArtifact
from d2dmoe_pl.adapters._task_heads import HEADS, PROBLEM_TYPES
from d2dmoe_pl.data.embeddings.pooling import pooled
from d2dmoe_pl.data.head import LABELLED_HEADS, VOCABULARY_HEADS, Head
from d2dmoe_pl.data.token_positions import num_token_positions
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import hooked

GENERATION_CONFIG = "generation_config.json"
CODE_POINTS = 128  # of ASCII, for models that take the code points of text


def text_config(config: Any) -> Any:
    """Where settings of texts are; a model of texts and pictures has a config for each."""
    return config if hasattr(config, "vocab_size") else getattr(config, "text_config", config)


class HuggingFaceAdapter(Adapter):
    """A family of ``transformers`` models, told by ``config.model_type``.

    Attributes:
        model_types: The types of its models.
        inputs: What a batch may hold for the model; everything else in it is for losses and metrics.
        activation_keys: What the models' configs call the FFNs' activation.
    """

    model_types: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[str, ...]]
    activation_keys: ClassVar[tuple[str, ...]] = ("hidden_act",)

    def as_linear(self, module: nn.Module) -> nn.Linear | TransposedLinear | None:
        return TransposedLinear(module) if isinstance(module, Conv1D) else plain_linear(module)

    def embedding_scale(self, module: nn.Module) -> float | None:
        if not type(module).__name__.endswith("ScaledWordEmbedding"):  # each model has such a class of its own
            return super().embedding_scale(module)
        if list(module._parameters) != ["weight"]:  # one has another row for a certain token
            return None
        scale: float = getattr(module, "scalar_embed_scale", None) or module.embed_scale  # type: ignore[assignment]
        return scale

    def matches(self, model: Any) -> bool:
        return isinstance(model, transformers.PreTrainedModel) and model.config.model_type in self.model_types

    def set_activation_(self, model: Any, ffns: Sequence[FFN], name: str, is_all: bool) -> None:
        check(name in ACT2FN, f"activation={name!r}: allowed are {', '.join(sorted(ACT2FN))}")
        made = self._made_with(model, name)
        for ffn in ffns:
            self.put_activation_(model, ffn, ACT2FN[name])
        if is_all:
            self._put_in_heads_(model, made, name)
            self._record_activation_(model.config, name)

    def _put_in_heads_(self, model: Any, made: nn.Module, name: str) -> None:
        """Give what else has its activation by the same setting, such as heads, the one that ``made`` has there."""
        parts, of_ffns = dict(model.named_modules()), {id(ffn.activation) for ffn in self.ffns(made)}
        for path, module in made.named_modules():
            is_one = type(module) is type(ACT2FN[name]) and id(module) not in of_ffns
            if is_one and path in parts and type(parts[path]) is not type(module):
                model.set_submodule(path, ACT2FN[name])

    def backbone_config(self, config: Any) -> Any:
        """Where in a model's ``config`` the settings of its layers are."""
        return config

    def _record_activation_(self, config: Any, name: str) -> None:
        for key in self.activation_keys:
            setattr(self.backbone_config(config), key, name)

    def _made_with(self, model: Any, name: str) -> nn.Module:
        """A model without weights, made from a config that says the activation ``name``.

        Raises:
            ConfigError: If its FFNs have another.
        """
        config = copy.deepcopy(model.config)
        self._record_activation_(config, name)
        with torch.device("meta"):
            made = type(model)._from_config(config)
        for ffn in self.ffns(made):
            check(
                type(ffn.activation) is type(ACT2FN[name]),
                f"activation={name!r}: {ffn.name} of a {type(model).__name__} has {ffn.activation_name} whatever its "
                "config says, and no file could say that it is another",
            )
        return made

    @abstractmethod
    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        """Replace the activation module of one FFN."""

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Adapter.logits`; on which side a text is padded makes no difference."""
        behind, back = padded_behind(batch)
        return self._read(model, behind, self._call(model, behind), back)

    def vocabulary_head(self, model: Any) -> nn.Module | None:
        return model.get_output_embeddings()

    def run_layers(self, model: Any, batch: Mapping[str, Tensor]) -> None:
        """See :meth:`Adapter.run_layers`; a head over a vocabulary is given one position of each text."""
        behind, _ = self.in_order(batch)
        head = self.vocabulary_head(model)
        with hooked([] if head is None else [head.register_forward_pre_hook(_first_position)]):
            self._call(model, behind)

    def traced_logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return self._read(model, batch, self._call(model, batch), lambda logits, dim: logits)

    def in_order(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Callable[[Tensor], Tensor]]:
        behind, back = padded_behind(batch)
        return behind, lambda logits: logits if logits.dim() == 2 else back(logits, self.token_dim(logits))

    @staticmethod
    def token_dim(logits: Tensor) -> int:
        """Which dimension of three is that of tokens."""
        return 2 if logits.shape[1] == 2 else 1

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        behind, back = padded_behind(batch)
        output = self._call(model, behind, output_hidden_states=True)
        return self._read(model, behind, output, back), tuple(back(states, 1) for states in output.hidden_states)

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        return model(**{key: batch[key] for key in self.inputs if key in batch}, **kwargs)

    @staticmethod
    def _read(model: Any, batch: Mapping[str, Tensor], output: Any, back: Callable[[Tensor, int], Tensor]) -> Tensor:
        """What :meth:`logits` gives, of the output for a batch with padding behind, and the way back for tokens."""
        if "logits" not in output and "start_logits" not in output:
            return pooled(output.last_hidden_state, batch.get(MASK), getattr(model.config, "pooling", "mean"))
        if "start_logits" in output:
            return back(torch.stack([output.start_logits, output.end_logits], dim=1), 2)  # (B, 2, L)
        return back(output.logits, 1) if output.logits.dim() == 3 else output.logits

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        config = model.config
        shape = self.input_shape(model)
        if shape is not None:
            return {"pixel_values": torch.randn(batch_size, *shape)}
        positions = getattr(config, "max_position_embeddings", length)
        check(
            length <= positions or positions < 0,
            f"length={length}: must be at most {positions}, the positions of the model",
        )
        return {"input_ids": torch.randint(self.vocabulary_size(model) or CODE_POINTS, (batch_size, length))}

    def head(self, model: Any) -> Head:
        """See :meth:`Adapter.head`.

        Raises:
            ConfigError: If it is none of those that the family's tasks need.
        """
        problem = model.config.problem_type
        told = next((head for head, name in PROBLEM_TYPES.items() if name == problem), "classification")
        for task in self.tasks:
            head, auto = HEADS[task]
            classes = auto._model_mapping.get(type(model.config), ())
            is_told = head == told or head not in ("classification", *PROBLEM_TYPES)
            if isinstance(model, classes) and is_told:
                return head
        raise ConfigError(
            f"{type(model).__name__}: its head is for none of the tasks that {self.title} models are used for here, "
            f"which are {', '.join(self.tasks)}"
        )

    def num_outputs(self, model: Any) -> int:
        head = self.head(model)
        if head == "embedding":
            return text_config(model.config).hidden_size
        size: int | None = self.vocabulary_size(model) if head in VOCABULARY_HEADS else model.config.num_labels
        assert size is not None
        return size

    def label_names(self, model: Any) -> list[str] | None:
        return outputs_of(model.config) if self.head(model) in LABELLED_HEADS else None

    def vocabulary_size(self, model: Any) -> int | None:
        return getattr(text_config(model.config), "vocab_size", None)

    def num_positions(self, model: Any) -> int | None:
        return num_token_positions(model)

    def input_shape(self, model: Any) -> tuple[int, int, int] | None:
        if model.main_input_name != "pixel_values":
            return None
        config = self.backbone_config(model.config)
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(config, "num_channels", 3), height, width

    def config(self, model: Any) -> dict[str, Any]:
        name, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
        check_of_library(
            model, type(model).__module__ == getattr(getattr(transformers, name, None), "__module__", None)
        )
        config = json.loads(model.config.to_json_string(use_diff=True))
        return {**config, "architectures": [name], "dtype": dtype}

    def save_beside(self, model: Any, folder: Path) -> None:
        """Write how the model generates text by default, where it can."""
        if model.can_generate():
            model.generation_config.to_json_file(folder / GENERATION_CONFIG)

    def mark_converted_(self, model: Any) -> None:
        model.save_pretrained = SavesArtifact(model)
        if model.can_generate():
            model.prepare_inputs_for_generation = PreparesInputs(model)
            model._get_stopping_criteria = GetsStoppingCriteria(model)

    def rebuild(self, model: Any) -> nn.Module:
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)

    def fill_buffers_(self, model: Any) -> None:
        # transformers' own way with models whose weights come from a file: what it thinks has been read is left alone
        without = place_meta_buffers_(model)
        for tensor in (*model.parameters(), *model.state_dict(keep_vars=True).values()) if without else ():
            tensor._is_hf_initialized = True
        owner = {
            module: part  # the last that has it is the innermost
            for part in model.modules()
            if isinstance(part, transformers.PreTrainedModel)
            for module in part.modules()
        }
        for module in without:
            owner[module]._init_weights(module)

    def exact_buffers(self, model: Any) -> AbstractContextManager[None]:
        return exact_buffers(model)

    def build(self, folder: Path) -> nn.Module:
        described = json.loads((folder / "config.json").read_text())
        ours = described.pop(KEY, {})
        model_type = ours.get("model_type", described.pop("model_type"))
        described.pop("model_type", None)
        named = [key for key in described if key.endswith("implementation") and "/" in str(described[key])]
        check(
            not named, f"{', '.join(named)} in config.json: names code on the hub; must be a way that transformers has"
        )
        config = type(transformers.AutoConfig.for_model(model_type)).from_dict(described)  # whatever it calls labels
        architecture = getattr(transformers, str(described["architectures"][0]), None)
        check(
            isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel),
            f"architectures={described['architectures']} in config.json: transformers has no such model",
        )
        assert architecture is not None
        model = architecture._from_config(config)
        if (folder / GENERATION_CONFIG).exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return model


def _first_position(head: nn.Module, args: tuple) -> tuple:
    vectors, *others = args
    return vectors[:, :1] if vectors.dim() == 3 else vectors, *others  # (B, L, d) to (B, 1, d)


def outputs_of(config: Any) -> list[str]:
    """Names of a classifier's outputs by index."""
    return [str(config.id2label[index]) for index in sorted(config.id2label)]


def check_not_chunked(module: nn.Module, name: str) -> None:
    """Raise ``ConfigError`` if ``module``, called ``name``, runs its FFN on a part of the sequence at a time."""
    size = getattr(module, "chunk_size_feed_forward", 0)
    check(size == 0, f"chunk_size_feed_forward={size} in {name}: must be 0 to have experts")
