"""Hugging Face GPT-NeoX, Pythia among them: the FFN is the ``mlp`` of each layer."""

from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

from d2dmoe_pl.adapters._decoder import DecoderAdapter
from d2dmoe_pl.adapters._ffn_module import PartNames


class GPTNeoXAdapter(DecoderAdapter):
    """See :class:`DecoderAdapter`.

    It names no projections: one module gives queries, keys and values head by head, in turns.
    """

    family = "gpt_neox"
    title = "Hugging Face GPT-NeoX, Pythia"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "causal-language-modeling",
    )
    model_types = ("gpt_neox",)
    ffn_classes = (GPTNeoXMLP,)
    parts = PartNames(up="dense_h_to_4h", activation="act", down="dense_4h_to_h")


ADAPTER = GPTNeoXAdapter()
