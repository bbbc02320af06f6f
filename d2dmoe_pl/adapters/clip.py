"""Hugging Face CLIP, the tower for pictures with a head for classes: the FFN is the ``mlp`` of each layer."""

from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import PartNames
from d2dmoe_pl.adapters._two_towers import TwoTowersAdapter


class CLIPAdapter(TwoTowersAdapter):
    """See :class:`TwoTowersAdapter`."""

    family = "clip"
    title = "Hugging Face CLIP (pictures)"
    tasks = ("image-classification",)
    model_types = ("clip",)
    inputs = ("pixel_values",)
    ffn_classes = (CLIPMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((CLIPAttention,), query="q_proj", key="k_proj", value="v_proj", output="out_proj")


ADAPTER = CLIPAdapter()
