"""Hugging Face DINOv2, its largest with gated FFNs: the FFN is the ``mlp`` of each layer."""

from typing import Any, ClassVar

from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2MLP, Dinov2SwiGLUFFN

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class Dinov2Adapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`."""

    family = "dinov2"
    title = "Hugging Face DINOv2"
    tasks = ("image-classification",)
    model_types = ("dinov2",)
    inputs = ("pixel_values",)
    ffn_classes = (Dinov2MLP, Dinov2SwiGLUFFN)
    parts: ClassVar[Any] = {
        Dinov2MLP: PartNames(up="fc1", activation="activation_fn", down="fc2"),
        Dinov2SwiGLUFFN: PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj"),
    }
    attention = AttentionParts((Dinov2Attention,), query="q_proj", key="k_proj", value="v_proj", output="o_proj")


ADAPTER = Dinov2Adapter()
