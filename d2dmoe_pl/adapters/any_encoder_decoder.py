"""Any other Hugging Face encoder-decoder Transformer: its FFNs are found by tracing."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from d2dmoe_pl.adapters._adapter import MASK
from d2dmoe_pl.adapters._encoder_decoder import DECODER_MASK, EncoderDecoderAdapter
from d2dmoe_pl.adapters.any_transformer import AnyTransformerAdapter


class AnyEncoderDecoderAdapter(EncoderDecoderAdapter, AnyTransformerAdapter):
    """See :class:`EncoderDecoderAdapter` and :class:`StructuralAdapter`."""

    family = "any_encoder_decoder"
    title = "any other encoder-decoder of Hugging Face"
    tasks = ("text-to-text", "text-classification", "text-regression", "multi-label-classification")
    kinds: ClassVar[Mapping[str, str]] = {"input_ids": "texts"}
    inputs = ("input_ids", MASK, "decoder_input_ids", DECODER_MASK)
    takes_other_positions = False

    def matches(self, model: Any) -> bool:
        return isinstance(model, transformers.PreTrainedModel) and bool(model.config.is_encoder_decoder)

    def example(self, model: Any, size: int, length: int) -> Mapping[str, Tensor]:
        if not model.can_generate():  # a head for whole texts
            return self.random_inputs(model, size, length)
        longer = self.random_inputs(model, size, length + 1)  # which tells answers from texts
        answers = longer.get("decoder_input_ids", longer["input_ids"])
        return {**self.random_inputs(model, size, length), "decoder_input_ids": answers}

    def masked(self, model: Any, texts: Mapping[str, Tensor], mask: Tensor) -> Mapping[str, Tensor]:
        batch = super().masked(model, texts, mask)
        if model.can_generate():
            return batch
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)  # (B,)
        return {**batch, "input_ids": self.ended(model, batch["input_ids"], last)}

    def vocabulary_size(self, model: Any) -> int | None:
        """See :meth:`Adapter.vocabulary_size`; of texts, where answers have another vocabulary."""
        return getattr(getattr(model.config, "encoder", model.config), "vocab_size", None)

    def answer_vocabulary_size(self, model: Any) -> int:
        size: int = getattr(model.config, "decoder", model.config).vocab_size
        return size

    def num_outputs(self, model: Any) -> int:
        return self.answer_vocabulary_size(model) if model.can_generate() else super().num_outputs(model)

    def streams(self, model: Any) -> Mapping[str, str]:
        return AnyTransformerAdapter.streams(self, model)

    def masks(self, model: Any) -> Mapping[str, str]:
        stacks = {model.get_encoder(): MASK, model.get_decoder(): DECODER_MASK if model.can_generate() else MASK}
        return {path: stacks[module] for path, module in model.named_modules() if module in stacks}


ADAPTER = AnyEncoderDecoderAdapter()
