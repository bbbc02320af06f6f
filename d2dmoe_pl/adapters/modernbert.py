"""Hugging Face ModernBERT: the FFN is the gated ``mlp`` of each layer, gate and up in one linear module."""

from transformers.models.modernbert.modeling_modernbert import ModernBertAttention, ModernBertMLP

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class ModernBertAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`."""

    family = "modernbert"
    title = "Hugging Face ModernBERT"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "masked-language-modeling",
        "embeddings",
    )
    model_types = ("modernbert",)
    inputs = ("input_ids", "attention_mask")
    activation_keys = ("hidden_activation",)
    ffn_classes = (ModernBertMLP,)
    parts = PartNames(gate_proj="Wi", up="Wi", activation="act", down="Wo", hidden_dropout="drop")
    attention = AttentionParts((ModernBertAttention,), fused="Wqkv", output="Wo")


ADAPTER = ModernBertAdapter()
