"""Hugging Face OPT: the FFN is spread over each layer. Its activation is ReLU already: no relufication is needed."""

from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import CausalAdapter
from d2dmoe_pl.adapters._ffn_in_layer import FFNInLayerAdapter


class OPTAdapter(CausalAdapter, FFNInLayerAdapter):
    """See :class:`FFNInLayerAdapter`."""

    family = "opt"
    title = "Hugging Face OPT"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("opt",)
    layer_classes = (OPTDecoderLayer,)
    attention = AttentionParts((OPTAttention,), query="q_proj", key="k_proj", value="v_proj", output="out_proj")


ADAPTER = OPTAdapter()
