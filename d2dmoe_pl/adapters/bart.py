"""Hugging Face BART: the FFN is spread over each layer of encoder and decoder."""

from transformers.models.bart.modeling_bart import BartDecoder, BartDecoderLayer, BartEncoder, BartEncoderLayer

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._encoder_decoder import EncoderDecoderAdapter
from d2dmoe_pl.adapters._ffn_in_layer import FFNInLayerAdapter


class BartAdapter(EncoderDecoderAdapter, FFNInLayerAdapter):
    """See :class:`EncoderDecoderAdapter` and :class:`FFNInLayerAdapter`."""

    family = "bart"
    title = "Hugging Face BART"
    tasks = ("text-classification", "text-regression", "multi-label-classification", "text-to-text")
    model_types = ("bart",)
    stack_classes = (BartEncoder, BartDecoder)
    layer_classes = (BartEncoderLayer, BartDecoderLayer)
    attention = AttentionParts(
        layer_classes,
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
    )


ADAPTER = BartAdapter()
