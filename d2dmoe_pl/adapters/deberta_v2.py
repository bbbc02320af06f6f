"""Hugging Face DeBERTa of the second and third version: BERT's layers under names of their own."""

from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Attention,
    DebertaV2Intermediate,
    DebertaV2Layer,
)

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters.bert import BertAdapter


class DebertaV2Adapter(BertAdapter):
    """See :class:`BertAdapter`.

    Of attention's projections it names the output: those of queries and keys are of relative positions as well.
    """

    family = "deberta_v2"
    title = "Hugging Face DeBERTa-v2, DeBERTa-v3"
    model_types = ("deberta-v2",)
    attention = AttentionParts((DebertaV2Attention,), output="output.dense")
    layer_class = DebertaV2Layer
    intermediate_class = DebertaV2Intermediate


ADAPTER = DebertaV2Adapter()
