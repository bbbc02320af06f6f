"""Hugging Face CamemBERT: RoBERTa's layers under names of their own."""

import dataclasses

from transformers.models.camembert.modeling_camembert import CamembertAttention, CamembertIntermediate, CamembertLayer

from d2dmoe_pl.adapters.bert import BertAdapter
from d2dmoe_pl.adapters.roberta import RobertaAdapter


class CamembertAdapter(RobertaAdapter):
    """See :class:`BertAdapter`."""

    family = "camembert"
    title = "Hugging Face CamemBERT"
    model_types = ("camembert",)
    attention = dataclasses.replace(BertAdapter.attention, classes=(CamembertAttention,))
    layer_class = CamembertLayer
    intermediate_class = CamembertIntermediate


ADAPTER = CamembertAdapter()
