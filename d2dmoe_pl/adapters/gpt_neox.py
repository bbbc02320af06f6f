"""Hugging Face GPT-NeoX, Pythia among them: the FFN is the ``mlp`` of each layer."""

from typing import Any

from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


def _num_heads(attention: Any) -> int:
    heads: int = attention.config.num_attention_heads
    return heads


class GPTNeoXAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "gpt_neox"
    title = "Hugging Face GPT-NeoX, Pythia"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("gpt_neox",)
    ffn_classes = (GPTNeoXMLP,)
    parts = PartNames(up="dense_h_to_4h", activation="act", down="dense_4h_to_h")
    # one module gives query, key and value of the first head, then those of the second, and so on
    attention = AttentionParts((GPTNeoXAttention,), fused="query_key_value", fused_turns=_num_heads, output="dense")


ADAPTER = GPTNeoXAdapter()
