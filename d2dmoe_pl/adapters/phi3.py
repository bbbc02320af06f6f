"""Hugging Face Phi-3, 3.5 and 4: the FFN is the gated ``mlp`` of each layer, gate and up in one linear module."""

from typing import Any

from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


def _fused_widths(attention: Any) -> tuple[int, int, int]:
    keys = attention.num_key_value_heads * attention.head_dim
    return attention.config.num_attention_heads * attention.head_dim, keys, keys


class Phi3Adapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "phi3"
    title = "Hugging Face Phi-3, Phi-4"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "causal-language-modeling",
    )
    model_types = ("phi3",)
    ffn_classes = (Phi3MLP,)
    parts = PartNames(gate_proj="gate_up_proj", up="gate_up_proj", activation="activation_fn", down="down_proj")
    attention = AttentionParts((Phi3Attention,), fused="qkv_proj", fused_widths=_fused_widths, output="o_proj")


ADAPTER = Phi3Adapter()
