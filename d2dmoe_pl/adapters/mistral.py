"""Hugging Face Mistral: the FFN is the gated ``mlp`` of each layer."""

from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class MistralAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "mistral"
    title = "Hugging Face Mistral"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("mistral",)
    ffn_classes = (MistralMLP,)
    parts = PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts((MistralAttention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = MistralAdapter()
