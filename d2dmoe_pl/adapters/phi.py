"""Hugging Face Phi-1, 1.5 and 2: the FFN is the ``mlp`` of each layer."""

from transformers.models.phi.modeling_phi import PhiAttention, PhiMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class PhiAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`."""

    family = "phi"
    title = "Hugging Face Phi, Phi-2"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "causal-language-modeling",
    )
    model_types = ("phi",)
    ffn_classes = (PhiMLP,)
    parts = PartNames(up="fc1", activation="activation_fn", down="fc2")
    attention = AttentionParts((PhiAttention,), query="q_proj", key="k_proj", value="v_proj", output="dense")


ADAPTER = PhiAdapter()
