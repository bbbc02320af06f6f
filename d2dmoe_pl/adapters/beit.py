"""Hugging Face BEiT: the FFN is the ``mlp`` of each layer."""

from transformers.models.beit.modeling_beit import BeitAttention, BeitMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class BeitAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`."""

    family = "beit"
    title = "Hugging Face BEiT"
    tasks = ("image-classification",)
    model_types = ("beit",)
    inputs = ("pixel_values",)
    ffn_classes = (BeitMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((BeitAttention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = BeitAdapter()
