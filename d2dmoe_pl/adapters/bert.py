"""Hugging Face BERT: the FFN is spread over ``intermediate`` and ``output.dense`` of each layer."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertLayer

from d2dmoe_pl.adapters._adapter import module_at
from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter, check_not_chunked


class _First(nn.Module):
    """Where ``output`` stood: dropout, residual and LayerNorm are done, the residual that comes along is not needed."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return hidden_states


class BertAdapter(HuggingFaceAdapter):
    """``intermediate`` is replaced and ``output.dense`` becomes an Identity; dropout, residual and LayerNorm stay.

    A module that takes these over as well stands in the place of ``intermediate``, and ``output`` hands it through.

    Attributes:
        layer_class: A layer.
        intermediate_class: Its ``intermediate``, as long as it is dense.
    """

    family = "bert"
    title = "Hugging Face BERT"
    tasks = (
        "text-classification",
        "text-regression",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "masked-language-modeling",
        "embeddings",
    )
    model_types = ("bert",)
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    attention = AttentionParts(
        (BertAttention,), query="self.query", key="self.key", value="self.value", output="output.dense"
    )
    layer_class: ClassVar[type[nn.Module]] = BertLayer
    intermediate_class: ClassVar[type[nn.Module]] = BertIntermediate

    def ffns(self, model: Any) -> list[FFN]:
        layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, self.layer_class)
        }
        for name, layer in layers.items():
            check_not_chunked(layer, name)
        return [
            FFN(
                name=f"{name}.intermediate",
                up=layer.intermediate.dense,
                activation=layer.intermediate.intermediate_act_fn,
                down=layer.output.dense,
                residual_norm=layer.output.LayerNorm,
            )
            for name, layer in layers.items()
            if issubclass(type(layer.intermediate), self.intermediate_class)
        ]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        layer, _ = module_at(model, ffn.name)
        layer.intermediate = module
        layer.output.dense = nn.Identity()

    def put_with_residual_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        layer, _ = module_at(model, ffn.name)
        layer.intermediate = module
        layer.output = _First()

    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        model.get_submodule(ffn.name).intermediate_act_fn = activation


ADAPTER = BertAdapter()
