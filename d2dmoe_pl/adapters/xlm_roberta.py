"""Hugging Face XLM-RoBERTa: RoBERTa's layers under names of their own."""

import dataclasses

from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaAttention,
    XLMRobertaIntermediate,
    XLMRobertaLayer,
)

from d2dmoe_pl.adapters.bert import BertAdapter
from d2dmoe_pl.adapters.roberta import RobertaAdapter


class XLMRobertaAdapter(RobertaAdapter):
    """See :class:`BertAdapter`."""

    family = "xlm_roberta"
    title = "Hugging Face XLM-RoBERTa"
    model_types = ("xlm-roberta",)
    attention = dataclasses.replace(BertAdapter.attention, classes=(XLMRobertaAttention,))
    layer_class = XLMRobertaLayer
    intermediate_class = XLMRobertaIntermediate


ADAPTER = XLMRobertaAdapter()
