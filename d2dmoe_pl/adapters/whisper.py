"""Hugging Face Whisper: the FFN is spread over each layer of the encoder; a decoder, if there is one, stays dense."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_in_layer import FFNInLayerAdapter
from d2dmoe_pl.adapters._of_recordings import OfRecordings


class WhisperAdapter(OfRecordings, FFNInLayerAdapter):
    """See :class:`FFNInLayerAdapter`. Recordings are of one length, and silence at their ends is no padding."""

    family = "whisper"
    title = "Hugging Face Whisper (encoder)"
    tasks = ("audio-classification",)
    model_types = ("whisper",)
    inputs = ("input_features", "decoder_input_ids")
    layer_classes = (WhisperEncoderLayer,)
    attention = AttentionParts(
        layer_classes,
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
    )

    def streams(self, model: Any) -> Mapping[str, str]:
        # of the layers themselves, which are given no mask: that of a call is of frames, of which a token is two
        encoders = [name for name, module in model.named_modules() if isinstance(module, WhisperEncoder)]
        return {f"{name}.layers": "mask_of_audio_tokens" for name in encoders}

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        config = model.config
        inputs = {"input_features": torch.randn(batch_size, config.num_mel_bins, 2 * config.max_source_positions)}
        if model.can_generate():
            inputs["decoder_input_ids"] = torch.full((batch_size, 1), config.decoder_start_token_id)
        return inputs

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`Adapter.logits_and_hidden_states`; the encoder's states."""
        output = self._call(model, batch, output_hidden_states=True)
        states = output.encoder_hidden_states if model.can_generate() else output.hidden_states
        return output.logits, tuple(states)

    def _call(self, model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
        has_decoder = model.can_generate()
        return super()._call(model, batch, **({"use_cache": False} if has_decoder else {}), **kwargs)


ADAPTER = WhisperAdapter()
