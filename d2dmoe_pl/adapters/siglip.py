"""Hugging Face SigLIP, the tower for pictures with a head for classes: the FFN is the ``mlp`` of each layer."""

from typing import Any

from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipMLP

from d2dmoe_pl.adapters._adapter import NO_MASK
from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._ffn_module import PartNames
from d2dmoe_pl.adapters._two_towers import TwoTowersAdapter


class SiglipAdapter(TwoTowersAdapter):
    """See :class:`TwoTowersAdapter`. The pooling head, which classes are not told by, has an ``mlp`` that stays."""

    family = "siglip"
    title = "Hugging Face SigLIP (pictures)"
    tasks = ("image-classification",)
    model_types = ("siglip",)
    inputs = ("pixel_values",)
    text_mask = NO_MASK  # a text is told by its last position, padding or not
    ffn_classes = (SiglipMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((SiglipAttention,), query="q_proj", key="k_proj", value="v_proj", output="out_proj")

    def ffns(self, model: Any) -> list[FFN]:
        return [ffn for ffn in super().ffns(model) if ".encoder." in ffn.name]


ADAPTER = SiglipAdapter()
