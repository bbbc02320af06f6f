"""Hugging Face RoBERTa: BERT's layers under names of their own."""

from transformers.models.roberta.modeling_roberta import RobertaIntermediate, RobertaLayer

from d2dmoe_pl.adapters.bert import BertAdapter


class RobertaAdapter(BertAdapter):
    """See :class:`BertAdapter`."""

    family = "roberta"
    title = "Hugging Face RoBERTa"
    model_types = ("roberta",)
    inputs = ("input_ids", "attention_mask")  # it has one type of token only
    head_activation = None
    layer_class = RobertaLayer
    intermediate_class = RobertaIntermediate


ADAPTER = RobertaAdapter()
