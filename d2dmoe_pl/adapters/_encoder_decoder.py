"""What Hugging Face families of encoder-decoder Transformers share."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2dmoe_pl.adapters._adapter import MASK
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter

DECODER_MASK = "decoder_attention_mask"


class EncoderDecoderAdapter(HuggingFaceAdapter):
    """Two stacks, each with a padding mask of its own.

    A head for whole texts gives the decoder the encoder's text, and its padding mask.

    Attributes:
        stack_classes: Of encoder and decoder.
    """

    inputs = ("input_ids", MASK, "decoder_input_ids", DECODER_MASK)
    stack_classes: ClassVar[tuple[type[nn.Module], ...]]

    def streams(self, model: Any) -> Mapping[str, str]:
        paths = [path for path, module in model.named_modules() if isinstance(module, self.stack_classes)]
        masks = (MASK, DECODER_MASK if model.can_generate() else MASK)
        return {path: masks[path.endswith("decoder")] for path in paths}

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        inputs = super().random_inputs(model, batch_size, length)
        if model.can_generate():
            inputs["decoder_input_ids"] = torch.randint(model.config.vocab_size, (batch_size, length))
        else:  # what the head reads is where the text ends, once
            end = model.config.eos_token_id
            inputs["input_ids"][inputs["input_ids"] == end] = end - 1
            inputs["input_ids"][:, -1] = end
        return inputs

    def in_order(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Callable[[Tensor], Tensor]]:
        behind, back = super().in_order(batch)
        return (behind, back) if "decoder_input_ids" not in batch else (behind, lambda logits: logits)

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        behind, _ = self.in_order(batch)
        return self.traced_logits(model, behind)

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`Adapter.logits_and_hidden_states`; the encoder's states, then the decoder's."""
        behind, _ = self.in_order(batch)
        output = self._call(model, behind, output_hidden_states=True)
        states = (*output.encoder_hidden_states, *output.decoder_hidden_states)
        return self._logits(output, lambda values, dim: values), states

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        if "decoder_input_ids" not in batch and MASK in batch:
            batch = {**batch, DECODER_MASK: batch[MASK]}
        return super()._call(model, batch, use_cache=False, **kwargs)
