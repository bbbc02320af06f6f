"""Hugging Face Qwen3: the FFN is the gated ``mlp`` of each layer."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class Qwen3Adapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "qwen3"
    title = "Hugging Face Qwen3"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("qwen3",)
    ffn_classes = (Qwen3MLP,)
    parts = PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts((Qwen3Attention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = Qwen3Adapter()
