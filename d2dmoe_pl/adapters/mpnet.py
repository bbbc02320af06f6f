"""Hugging Face MPNet: BERT's layers under names of their own, attention's among them."""

from transformers.models.mpnet.modeling_mpnet import MPNetIntermediate, MPNetLayer, MPNetSelfAttention

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters.roberta import RobertaAdapter


class MPNetAdapter(RobertaAdapter):
    """See :class:`BertAdapter`."""

    family = "mpnet"
    title = "Hugging Face MPNet"
    model_types = ("mpnet",)
    attention = AttentionParts((MPNetSelfAttention,), query="q", key="k", value="v", output="o")
    layer_class = MPNetLayer
    intermediate_class = MPNetIntermediate


ADAPTER = MPNetAdapter()
