"""Hugging Face Llama: the FFN is the gated ``mlp`` of each layer."""

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from d2dmoe_pl.adapters.attention import AttentionParts
from d2dmoe_pl.adapters.decoder import DecoderAdapter
from d2dmoe_pl.adapters.ffn_module import PartNames


class LlamaAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "llama"
    title = "Hugging Face Llama"
    tasks = ("text-classification", "text-regression", "question-answering", "causal-language-modeling")
    model_types = ("llama",)
    ffn_classes = (LlamaMLP,)
    parts = PartNames(gate="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts((LlamaAttention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = LlamaAdapter()
