"""Hugging Face Qwen3: Llama's layers under names of their own."""

import dataclasses

from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from d2dmoe_pl.adapters.llama import LlamaAdapter


class Qwen3Adapter(LlamaAdapter):
    """See :class:`DecoderAdapter`."""

    family = "qwen3"
    title = "Hugging Face Qwen3"
    model_types = ("qwen3",)
    ffn_classes = (Qwen3MLP,)
    attention = dataclasses.replace(LlamaAdapter.attention, classes=(Qwen3Attention,))


ADAPTER = Qwen3Adapter()
