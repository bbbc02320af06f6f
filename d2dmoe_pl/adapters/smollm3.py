"""Hugging Face SmolLM3: Llama's layers under names of their own."""

import dataclasses

from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3MLP

from d2dmoe_pl.adapters.llama import LlamaAdapter


class SmolLM3Adapter(LlamaAdapter):
    """See :class:`DecoderAdapter`."""

    family = "smollm3"
    title = "Hugging Face SmolLM3"
    model_types = ("smollm3",)
    ffn_classes = (SmolLM3MLP,)
    attention = dataclasses.replace(LlamaAdapter.attention, classes=(SmolLM3Attention,))


ADAPTER = SmolLM3Adapter()
