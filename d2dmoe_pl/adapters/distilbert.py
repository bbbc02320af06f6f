"""Hugging Face DistilBERT: the FFN is the ``ffn`` of each layer, with a LayerNorm after the residual outside it."""

import dataclasses
from typing import Any

from torch import Tensor, nn
from transformers.models.distilbert import modeling_distilbert

from d2dmoe_pl.adapters._adapter import module_at
from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._ffn_module import FFNModuleAdapter, PartNames


class DistilBertAdapter(FFNModuleAdapter):
    """See :class:`FFNModuleAdapter`.

    A module that takes residual and LayerNorm over as well gives its output less its input: the layer then adds the
    input again, and no norm follows.
    """

    family = "distilbert"
    title = "Hugging Face DistilBERT"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "masked-language-modeling",
        "embeddings",
    )
    model_types = ("distilbert",)
    inputs = ("input_ids", "attention_mask")
    activation_keys = ("activation",)
    ffn_classes = (modeling_distilbert.FFN,)
    parts = PartNames(up="lin1", activation="activation", down="lin2", output_dropout="dropout")
    attention = AttentionParts(
        (modeling_distilbert.DistilBertSelfAttention,), query="q_lin", key="k_lin", value="v_lin", output="out_lin"
    )

    def ffns(self, model: Any) -> list[FFN]:
        return [
            dataclasses.replace(ffn, residual_norm=module_at(model, ffn.name)[0].output_layer_norm)
            for ffn in super().ffns(model)
        ]

    def put_with_residual_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        self.put_(model, ffn, module)
        module.register_forward_hook(_less_input)
        layer, _ = module_at(model, ffn.name)
        layer.output_layer_norm = nn.Identity()


def _less_input(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output - args[0]


ADAPTER = DistilBertAdapter()
