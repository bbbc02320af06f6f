"""Hugging Face ELECTRA: BERT's layers under names of their own."""

import dataclasses

from transformers.models.electra.modeling_electra import ElectraAttention, ElectraIntermediate, ElectraLayer

from d2dmoe_pl.adapters.bert import BertAdapter


class ElectraAdapter(BertAdapter):
    """See :class:`BertAdapter`."""

    family = "electra"
    title = "Hugging Face ELECTRA"
    model_types = ("electra",)
    attention = dataclasses.replace(BertAdapter.attention, classes=(ElectraAttention,))
    layer_class = ElectraLayer
    intermediate_class = ElectraIntermediate


ADAPTER = ElectraAdapter()
