"""Hugging Face ViT: the FFN is the ``mlp`` of each layer."""

from torch import nn
from transformers.models.vit.modeling_vit import ViTMLP

from d2dmoe_pl.adapters.base import module_at
from d2dmoe_pl.adapters.ffn import FFN
from d2dmoe_pl.adapters.hugging_face import HuggingFaceAdapter


class ViTAdapter(HuggingFaceAdapter):
    """``mlp`` is replaced; the layer's dropout and residual stay."""

    family = "vit"

    def ffns(self, model: nn.Module) -> list[FFN]:
        return [
            FFN(name=name, up=mlp.fc1, activation=mlp.activation_fn, down=mlp.fc2)
            for name, mlp in model.named_modules()
            if isinstance(mlp, ViTMLP)
        ]

    def put_(self, model: nn.Module, ffn: FFN, module: nn.Module) -> None:
        parent, attribute = module_at(model, ffn.name)
        setattr(parent, attribute, module)

    def put_activation_(self, model: nn.Module, ffn: FFN, activation: nn.Module) -> None:
        model.get_submodule(ffn.name).activation_fn = activation


ADAPTER = ViTAdapter()
