"""Hugging Face GPT-2: the FFN is the ``mlp`` of each layer, of ``Conv1D`` projections."""

from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class GPT2Adapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "gpt2"
    title = "Hugging Face GPT-2"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("gpt2",)
    activation_keys = ("activation_function",)
    ffn_classes = (GPT2MLP,)
    parts = PartNames(up="c_fc", activation="act", down="c_proj", output_dropout="dropout")
    attention = AttentionParts((GPT2Attention,), fused="c_attn", output="c_proj")


ADAPTER = GPT2Adapter()
