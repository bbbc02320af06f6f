"""Hugging Face Qwen2 and Qwen2.5: the FFN is the gated ``mlp`` of each layer."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class Qwen2Adapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "qwen2"
    title = "Hugging Face Qwen2, Qwen2.5"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("qwen2",)
    ffn_classes = (Qwen2MLP,)
    parts = PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts((Qwen2Attention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = Qwen2Adapter()
