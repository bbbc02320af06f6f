"""Hugging Face Gemma, of three generations: the FFN is the gated ``mlp`` of each layer."""

from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2MLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3MLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class GemmaAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`. Gemma 3 is here where it is of text alone."""

    family = "gemma"
    title = "Hugging Face Gemma, Gemma 2, Gemma 3 (text)"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "causal-language-modeling",
    )
    model_types = ("gemma", "gemma2", "gemma3_text")
    ffn_classes = (GemmaMLP, Gemma2MLP, Gemma3MLP)
    parts = PartNames(gate_proj="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
    attention = AttentionParts(
        (GemmaAttention, Gemma2Attention, Gemma3Attention),
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="o_proj",
    )
    activation_keys = ("hidden_act", "hidden_activation")  # a generation reads one of them; published ones have both


ADAPTER = GemmaAdapter()
