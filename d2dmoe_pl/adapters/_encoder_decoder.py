"""What Hugging Face families of encoder-decoder Transformers share."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from d2dmoe_pl.adapters._adapter import MASK
from d2dmoe_pl.adapters._generation import written_by
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter
from d2dmoe_pl.adapters._padding import padded_behind
from d2dmoe_pl.errors import check

DECODER_MASK = "decoder_attention_mask"

# what of a model's generation config says how texts begin and end, rather than what is to be written
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id")


class EncoderDecoderAdapter(HuggingFaceAdapter):
    """Two stacks, each with a padding mask of its own.

    A head for whole texts gives the decoder the encoder's text, and its padding mask.

    Attributes:
        stack_classes: Of encoder and decoder.
        starts_with_padding: Whether answers begin with the token for padding, where no config says with which.
    """

    inputs = ("input_ids", MASK, "decoder_input_ids", DECODER_MASK)
    stack_classes: ClassVar[tuple[type[nn.Module], ...]]
    starts_with_padding: ClassVar[bool] = False

    def streams(self, model: Any) -> Mapping[str, str]:
        paths = [path for path, module in model.named_modules() if isinstance(module, self.stack_classes)]
        masks = (MASK, DECODER_MASK if model.can_generate() else MASK)
        return {path: masks[path.endswith("decoder")] for path in paths}

    def answer_tokens(self, model: Any) -> tuple[int, int] | None:
        """See :meth:`Adapter.answer_tokens`.

        Raises:
            ConfigError: If the model's config does not say them.
        """
        if not model.can_generate():
            return None
        start: Any
        end: Any
        start, end = model.generation_config.decoder_start_token_id, model.generation_config.eos_token_id
        start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
        start = model.config.pad_token_id if start is None and self.starts_with_padding else start
        check(
            start is not None and isinstance(end, int),
            f"decoder_start_token_id={start}, eos_token_id={end} in the config of {type(model).__name__}: must be the "
            "tokens that an answer begins and ends with",
        )
        return start, end

    def text_end(self, model: Any) -> int | None:
        end: int | None = None if model.can_generate() else model.config.eos_token_id
        return end

    def write(self, model: Any, batch: Mapping[str, Tensor], num_tokens: int) -> Tensor:
        behind, _ = padded_behind(batch)
        given = {key: behind[key] for key in ("input_ids", MASK) if key in behind}
        start, _ = self.answer_tokens(model) or (None, None)
        own = {key: getattr(model.generation_config, key, None) for key in TOKENS}
        return written_by(model, GenerationConfig(**own, decoder_start_token_id=start), given, num_tokens)

    def answer_vocabulary_size(self, model: Any) -> int:
        """How many token ids answers are of."""
        size: int = model.config.vocab_size
        return size

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        inputs = super().random_inputs(model, batch_size, length)
        if model.can_generate():
            inputs["decoder_input_ids"] = torch.randint(self.answer_vocabulary_size(model), (batch_size, length))
        else:
            inputs["input_ids"] = self.ended(model, inputs["input_ids"], torch.full((batch_size,), length - 1))
        return inputs

    def ended(self, model: Any, ids: Tensor, last: Tensor) -> Tensor:
        """Texts ``(B, L)`` that end at positions ``last``, ``(B,)``, and nowhere else: a head reads what is there."""
        end = model.config.eos_token_id
        return ids.masked_fill(ids == end, end - 1).scatter(1, last.unsqueeze(1), end)

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
        return self._read(model, behind, output, lambda values, dim: values), states

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        if "decoder_input_ids" not in batch and MASK in batch:
            batch = {**batch, DECODER_MASK: batch[MASK]}
        return super()._call(model, batch, use_cache=False, **kwargs)
