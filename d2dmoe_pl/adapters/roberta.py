"""Hugging Face RoBERTa: BERT's layers under names of their own."""

import dataclasses
from typing import ClassVar

from torch import nn
from transformers.models.roberta.modeling_roberta import RobertaAttention, RobertaIntermediate, RobertaLayer

from d2dmoe_pl.adapters.bert import BertAdapter


class RobertaAdapter(BertAdapter):
    """See :class:`BertAdapter`."""

    family = "roberta"
    title = "Hugging Face RoBERTa"
    model_types = ("roberta",)
    inputs = ("input_ids", "attention_mask")  # it has one type of token only
    attention = dataclasses.replace(BertAdapter.attention, classes=(RobertaAttention,))
    layer_class: ClassVar[type[nn.Module]] = RobertaLayer
    intermediate_class: ClassVar[type[nn.Module]] = RobertaIntermediate


ADAPTER = RobertaAdapter()
