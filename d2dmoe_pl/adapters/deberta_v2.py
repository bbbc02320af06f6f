"""Hugging Face DeBERTa of the second and third version: BERT's layers under names of their own."""

from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Attention,
    DebertaV2Intermediate,
    DebertaV2Layer,
)

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters.bert import BertAdapter


def _replaceable(attention: DebertaV2Attention) -> tuple[str, ...]:
    inner = attention.self
    is_shared = inner.relative_attention and inner.share_att_key
    return ("value", "output") if is_shared else ("query", "key", "value", "output")


class DebertaV2Adapter(BertAdapter):
    """See :class:`BertAdapter`.

    Where the projections of queries and keys are those of relative positions as well, as in DeBERTa-v3, attention's
    other two alone become experts.
    """

    family = "deberta_v2"
    title = "Hugging Face DeBERTa-v2, DeBERTa-v3"
    model_types = ("deberta-v2",)
    attention = AttentionParts(
        (DebertaV2Attention,),
        query="self.query_proj",
        key="self.key_proj",
        value="self.value_proj",
        output="output.dense",
        replaceable=_replaceable,
    )
    layer_class = DebertaV2Layer
    intermediate_class = DebertaV2Intermediate


ADAPTER = DebertaV2Adapter()
