"""Hugging Face Mistral: Llama's layers under names of their own."""

import dataclasses

from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP

from d2dmoe_pl.adapters.llama import LlamaAdapter


class MistralAdapter(LlamaAdapter):
    """See :class:`DecoderAdapter`."""

    family = "mistral"
    title = "Hugging Face Mistral"
    model_types = ("mistral",)
    ffn_classes = (MistralMLP,)
    attention = dataclasses.replace(LlamaAdapter.attention, classes=(MistralAttention,))


ADAPTER = MistralAdapter()
