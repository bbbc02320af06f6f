"""Hugging Face SmolLM3: the FFN is the gated ``mlp`` of each layer."""

from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3MLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class SmolLM3Adapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "smollm3"
    title = "Hugging Face SmolLM3"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("smollm3",)
    ffn_classes = (SmolLM3MLP,)
    parts = PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts((SmolLM3Attention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = SmolLM3Adapter()
