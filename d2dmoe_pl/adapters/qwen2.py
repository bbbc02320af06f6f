"""Hugging Face Qwen2 and Qwen2.5: Llama's layers under names of their own."""

import dataclasses

from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP

from d2dmoe_pl.adapters.llama import LlamaAdapter


class Qwen2Adapter(LlamaAdapter):
    """See :class:`DecoderAdapter`."""

    family = "qwen2"
    title = "Hugging Face Qwen2, Qwen2.5"
    model_types = ("qwen2",)
    ffn_classes = (Qwen2MLP,)
    attention = dataclasses.replace(LlamaAdapter.attention, classes=(Qwen2Attention,))


ADAPTER = Qwen2Adapter()
