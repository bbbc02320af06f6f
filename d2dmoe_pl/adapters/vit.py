"""Hugging Face ViT: the FFN is the ``mlp`` of each layer."""

from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class ViTAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`."""

    family = "vit"
    title = "Hugging Face ViT"
    tasks = ("image-classification",)
    model_types = ("vit",)
    inputs = ("pixel_values",)
    ffn_classes = (ViTMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((ViTAttention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = ViTAdapter()
