"""Hugging Face T5 and Flan-T5: the FFN, gated in some, is ``DenseReluDense`` of each layer."""

from typing import Any, ClassVar

from transformers.models.t5.modeling_t5 import (
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerSelfAttention,
    T5Stack,
)

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._encoder_decoder import EncoderDecoderAdapter
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class T5Adapter(EncoderDecoderAdapter, FFNModuleAdapter):
    """See :class:`EncoderDecoderAdapter` and :class:`FFNModuleAdapter`."""

    family = "t5"
    title = "Hugging Face T5, Flan-T5"
    tasks = ("text-classification", "text-regression", "multi-label-classification", "text-to-text")
    model_types = ("t5",)
    stack_classes = (T5Stack,)
    starts_with_padding = True
    activation_keys = ("dense_act_fn",)
    ffn_classes = (T5DenseActDense, T5DenseGatedActDense)
    parts: ClassVar[Any] = {
        T5DenseActDense: PartNames(up="wi", activation="act", down="wo", hidden_dropout="dropout"),
        T5DenseGatedActDense: PartNames(
            gate_proj="wi_0", up="wi_1", activation="act", down="wo", hidden_dropout="dropout"
        ),
    }
    attention = AttentionParts(
        (T5LayerSelfAttention,),
        query="SelfAttention.q",
        key="SelfAttention.k",
        value="SelfAttention.v",
        output="SelfAttention.o",
    )

    def _record_activation_(self, config: Any, name: str) -> None:
        super()._record_activation_(config, name)
        config.feed_forward_proj = f"gated-{name}" if config.is_gated_act else name


ADAPTER = T5Adapter()
