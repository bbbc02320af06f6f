"""Hugging Face families whose layers have the FFN's parts among their own: ``fc2(activation_fn(fc1(x)))``."""

from typing import Any, ClassVar

from torch import nn

from d2dmoe_pl.adapters._adapter import module_at
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._hugging_face import HuggingFaceAdapter


class FFNInLayerAdapter(HuggingFaceAdapter):
    """``fc1`` is replaced; ``activation_fn`` and ``fc2`` become an Identity, and dropout between them is moved inside.

    Attributes:
        layer_classes: The classes of the layers.
    """

    layer_classes: ClassVar[tuple[type[nn.Module], ...]]
    activation_keys: ClassVar[tuple[str, ...]] = ("activation_function",)

    def ffns(self, model: Any) -> list[FFN]:
        layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, self.layer_classes)
        }
        return [
            FFN(
                name=f"{name}.fc1",
                up=layer.fc1,
                activation=layer.activation_fn,
                down=layer.fc2,
                hidden_dropout=nn.Dropout(getattr(layer, "activation_dropout", 0.0)),
            )
            for name, layer in layers.items()
            if not isinstance(layer.fc2, nn.Identity)
        ]

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        layer, _ = module_at(model, ffn.name)
        layer.fc1, layer.activation_fn, layer.fc2 = module, nn.Identity(), nn.Identity()
        layer.activation_dropout = 0.0  # its place is between the two products

    def taken_back_(self, model: Any, name: str) -> None:
        layer, _ = module_at(model, name)
        layer.activation_dropout = getattr(model.config, "activation_dropout", 0.0)

    def put_activation_(self, model: Any, ffn: FFN, activation: nn.Module) -> None:
        layer, _ = module_at(model, ffn.name)
        layer.activation_fn = activation
