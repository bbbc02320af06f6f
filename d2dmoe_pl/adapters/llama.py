"""Hugging Face Llama: the FFN is the gated ``mlp`` of each layer."""

from typing import ClassVar

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class LlamaAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "llama"
    title = "Hugging Face Llama"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("llama",)
    ffn_classes: ClassVar[tuple[type[nn.Module], ...]] = (LlamaMLP,)
    parts = PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts((LlamaAttention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = LlamaAdapter()
