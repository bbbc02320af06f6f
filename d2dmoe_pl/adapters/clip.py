"""Hugging Face CLIP, the tower for pictures with a head for classes: the FFN is the ``mlp`` of each layer."""

from typing import Any

from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class CLIPAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`."""

    family = "clip"
    title = "Hugging Face CLIP (pictures)"
    tasks = ("image-classification",)
    model_types = ("clip",)
    inputs = ("pixel_values",)
    ffn_classes = (CLIPMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((CLIPAttention,), query="q_proj", key="k_proj", value="v_proj", output="out_proj")

    def backbone_config(self, config: Any) -> Any:
        return config.vision_config


ADAPTER = CLIPAdapter()
