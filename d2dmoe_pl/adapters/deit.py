"""Hugging Face DeiT, with one head or with a second one on the distillation token: the FFN is ViT's."""

from transformers.models.deit.modeling_deit import DeiTAttention, DeiTMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class DeiTAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`. With two heads, the logits are their mean."""

    family = "deit"
    title = "Hugging Face DeiT"
    tasks = ("image-classification",)
    model_types = ("deit",)
    inputs = ("pixel_values",)
    ffn_classes = (DeiTMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((DeiTAttention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = DeiTAdapter()
