"""timm Vision Transformers, DeiT among them: the FFN is the ``mlp`` of each block."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention, Mlp, get_act_layer
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2dmoe_pl.adapters._adapter import Adapter, module_at, place_meta_buffers_
from d2dmoe_pl.adapters._attention import AttentionParts, Projection
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._timm_model import create_timm_model
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.data.output_names import placeholders
from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.hooks import hooked


class TimmViTAdapter(Adapter):
    """``mlp`` is replaced; what it had of dropout inside goes into the replacement, the rest of the block stays."""

    family = "timm_vit"
    title = "timm ViT, DeiT"
    tasks = ("image-classification",)
    attention = AttentionParts((Attention,), fused="qkv", output="proj")

    def matches(self, model: Any) -> bool:
        return isinstance(model, VisionTransformer)

    def ffns(self, model: Any) -> list[FFN]:
        found: dict[str, Any] = {name: mlp for name, mlp in model.named_modules() if isinstance(mlp, Mlp)}
        for name, mlp in found.items():
            check(
                isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.norm, nn.Identity),
                f"{name}: an FFN of convolutions, or with a norm between its products, cannot be split into experts",
            )
        return [
            FFN(name, mlp.fc1, mlp.act, mlp.fc2, hidden_dropout=mlp.drop1, output_dropout=mlp.drop2)
            for name, mlp in found.items()
        ]

    def projections(self, model: Any) -> list[Projection]:
        for name, block in model.blocks.named_children():
            attention = getattr(block, "attn", None)
            check(
                isinstance(attention, Attention) and getattr(attention, "gate", None) is None,
                f"blocks.{name}: its attention is gated or no plain one, and its projections cannot be taken apart",
            )
        return super().projections(model)

    def put_(self, model: Any, ffn: FFN, module: nn.Module) -> None:
        parent, attribute = module_at(model, ffn.name)
        setattr(parent, attribute, module)

    def set_activation_(self, model: Any, ffns: Sequence[FFN], name: str) -> None:
        try:
            activation = get_act_layer(name)
        except KeyError:
            raise ConfigError(f"activation={name!r}: timm knows no such activation; allowed is e.g. relu") from None
        for ffn in ffns:
            model.get_submodule(ffn.name).act = activation()
        model.model_args = {**self._model_args(model), "act_layer": name}

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["pixel_values"])

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        states: list[Tensor] = []

        def handles() -> Iterator[RemovableHandle]:
            yield model.blocks[0].register_forward_pre_hook(lambda block, args: states.append(args[0]))
            for block in model.blocks:
                yield block.register_forward_hook(lambda block, args, output: states.append(output))

        with hooked(handles()):
            logits = self.logits(model, batch)
        return logits, tuple(states)

    def random_inputs(self, model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch_size, *self.input_shape(model))}

    def input_shape(self, model: Any) -> tuple[int, int, int]:
        embedding = model.patch_embed
        height, width = embedding.img_size
        return embedding.proj.in_channels, height, width

    def set_preprocessing_(self, model: Any, preprocessing: ImagePreprocessing) -> None:
        model.pretrained_cfg = {**model.pretrained_cfg, **preprocessing.pretrained_cfg()}

    def head(self, model: Any) -> Head:
        return "classification"

    def num_outputs(self, model: Any) -> int:
        return model.num_classes

    def label_names(self, model: Any) -> list[str] | None:
        return getattr(model, "label_names", None) or placeholders(model.num_classes)

    def config(self, model: Any) -> dict[str, Any]:
        preprocessing = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {
            "architecture": model.pretrained_cfg["architecture"],
            "num_classes": model.num_classes,
            "model_args": self._model_args(model),
            "label_names": getattr(model, "label_names", None),
            "pretrained_cfg": {key: model.pretrained_cfg[key] for key in preprocessing if key in model.pretrained_cfg},
        }

    def build(self, folder: Path) -> nn.Module:
        return self._create(json.loads((folder / "config.json").read_text()))

    def rebuild(self, model: Any) -> nn.Module:
        return self._create(self.config(model))

    def fill_buffers_(self, model: Any) -> None:
        module: Any
        for module in place_meta_buffers_(model):
            module.init_non_persistent_buffers()

    @staticmethod
    def _create(config: dict[str, Any]) -> nn.Module:
        return create_timm_model(
            config["architecture"], config["num_classes"], config["model_args"], config["label_names"]
        )

    @staticmethod
    def _model_args(model: Any) -> dict[str, Any]:
        # timm before 1.0.30 does not record how a model was made
        if not hasattr(model, "model_args"):
            raise ValueError(
                f"{type(model).__name__}: set model.model_args to the keyword arguments given to timm.create_model "
                "(an empty dict if there were none), so that the model can be rebuilt"
            )
        return model.model_args


ADAPTER = TimmViTAdapter()
