"""Any other Hugging Face Transformer: its FFNs are found by tracing."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from d2dmoe_pl.adapters._adapter import MASK, TaskName
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter
from d2dmoe_pl.adapters._structural import LENGTH, StructuralAdapter
from d2dmoe_pl.errors import ConfigError

# what configs call the activation of FFNs
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn", "dense_act_fn")


class AnyTransformerAdapter(StructuralAdapter, HuggingFaceAdapter):
    """See :class:`StructuralAdapter`. Of texts it gives a model what its ``forward`` takes."""

    family = "any_transformer"
    title = "any other of Hugging Face"
    tasks: ClassVar[tuple[TaskName, ...]] = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
        "masked-language-modeling",
        "embeddings",
        "image-classification",
    )
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", MASK, "token_type_ids", "pixel_values")

    def matches(self, model: Any) -> bool:
        return isinstance(model, transformers.PreTrainedModel) and not model.config.is_encoder_decoder

    def example(self, model: Any) -> Mapping[str, Tensor]:
        if model.main_input_name not in ("input_ids", "pixel_values"):
            raise ConfigError(
                f"{type(model).__name__}: no adapter knows it, and it takes {model.main_input_name}; what is taken of "
                "others are texts and pictures"
            )
        return self.random_inputs(model, 2, LENGTH)

    def _record_activation_(self, config: Any, name: str) -> None:
        parts = [
            config,
            *(value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)),
        ]
        for part in parts:
            for key in ACTIVATION_KEYS:
                if isinstance(getattr(part, key, None), str):
                    setattr(part, key, name)
            if isinstance(getattr(part, "feed_forward_proj", None), str):
                part.feed_forward_proj = f"gated-{name}" if part.is_gated_act else name

    def put_activation_(self, model: Any, ffn: Any, activation: nn.Module) -> None:
        StructuralAdapter.put_activation_(self, model, ffn, activation)

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        taken = inspect.signature(model.forward).parameters
        given = {key: value for key, value in batch.items() if key in taken}
        mask, pad = given.get(MASK), getattr(model.config, "pad_token_id", None)
        if getattr(model.config, "type_vocab_size", 2) < 2:
            given.pop("token_type_ids", None)
        if mask is not None and pad is not None and "input_ids" in given:
            # by padding's id some find the last token, or count positions
            given["input_ids"] = torch.where(mask == 0, pad, given["input_ids"])
        if "use_cache" in taken:
            kwargs["use_cache"] = False
        return super()._call(model, given, **kwargs)


ADAPTER = AnyTransformerAdapter()
