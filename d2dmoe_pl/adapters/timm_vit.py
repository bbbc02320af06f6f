"""timm Vision Transformers, DeiT among them: the FFN is the ``mlp`` of each block."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Attention, Mlp, get_act_layer
from timm.models import VisionTransformer
from torch import Tensor, nn

from d2dmoe_pl.adapters.attention import AttentionParts, Projection
from d2dmoe_pl.adapters.base import Adapter, ModelSource, module_at
from d2dmoe_pl.adapters.ffn import FFN
from d2dmoe_pl.data.task import Head
from d2dmoe_pl.errors import ConfigError, check


class TimmViTAdapter(Adapter):
    """``mlp`` is replaced; what it had of dropout inside goes into the replacement, the rest of the block stays."""

    family = "timm_vit"
    title = "timm ViT, DeiT"
    tasks = ("image-classification",)
    attention = AttentionParts((Attention,), fused="qkv", output="proj")

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def ffns(self, model: nn.Module) -> list[FFN]:
        found = {name: mlp for name, mlp in model.named_modules() if isinstance(mlp, Mlp)}
        for name, mlp in found.items():
            check(
                isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.norm, nn.Identity),
                f"{name}: an FFN of convolutions, or with a norm between its products, cannot be split into experts",
            )
        return [
            FFN(name, mlp.fc1, mlp.act, mlp.fc2, hidden_dropout=mlp.drop1, output_dropout=mlp.drop2)
            for name, mlp in found.items()
        ]

    def projections(self, model: nn.Module) -> list[Projection]:
        for name, block in model.blocks.named_children():
            attention = getattr(block, "attn", None)
            check(
                isinstance(attention, Attention) and getattr(attention, "gate", None) is None,
                f"blocks.{name}: its attention is gated or no plain one, and its projections cannot be taken apart",
            )
        return super().projections(model)

    def put_(self, model: nn.Module, ffn: FFN, module: nn.Module) -> None:
        parent, attribute = module_at(model, ffn.name)
        setattr(parent, attribute, module)

    def set_activation_(self, model: nn.Module, ffns: Sequence[FFN], name: str) -> None:
        try:
            activation = get_act_layer(name)
        except KeyError:
            raise ConfigError(f"activation={name!r}: timm knows no such activation; allowed is e.g. relu") from None
        for ffn in ffns:
            model.get_submodule(ffn.name).act = activation()
        model.model_args = {**self._model_args(model), "act_layer": name}

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["pixel_values"])

    def logits_and_hidden_states(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        states: list[Tensor] = []
        handles = [model.blocks[0].register_forward_pre_hook(lambda block, args: states.append(args[0]))]
        handles += [
            block.register_forward_hook(lambda block, args, output: states.append(output)) for block in model.blocks
        ]
        try:
            logits = self.logits(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return logits, tuple(states)

    def random_inputs(self, model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
        embedding = model.patch_embed
        return {"pixel_values": torch.randn(batch_size, embedding.proj.in_channels, *embedding.img_size)}

    def head(self, model: nn.Module) -> Head:
        return "classification"

    def num_outputs(self, model: nn.Module) -> int:
        return model.num_classes

    def config(self, model: nn.Module) -> dict[str, Any]:
        preprocessing = ("input_size", "mean", "std", "interpolation", "crop_pct")
        return {
            "architecture": model.pretrained_cfg["architecture"],
            "num_classes": model.num_classes,
            "model_args": self._model_args(model),
            "label_names": getattr(model, "label_names", None),
            "pretrained_cfg": {key: model.pretrained_cfg[key] for key in preprocessing},
        }

    def build(self, folder: Path) -> nn.Module:
        config = json.loads((folder / "config.json").read_text())
        return _create(config["architecture"], config["num_classes"], config["model_args"], config["label_names"])

    @staticmethod
    def _model_args(model: nn.Module) -> dict[str, Any]:
        # timm before 1.0.30 does not record how a model was made
        if not hasattr(model, "model_args"):
            raise ValueError(
                f"{type(model).__name__}: set model.model_args to the keyword arguments given to timm.create_model "
                "(an empty dict if there were none), so that the model can be rebuilt"
            )
        return model.model_args


def _create(
    architecture: str, num_classes: int, model_args: dict[str, Any], label_names: Sequence[str] | None, **kwargs: Any
) -> nn.Module:
    model = timm.create_model(architecture, num_classes=num_classes, **model_args, **kwargs)
    model.model_args = dict(model_args)
    model.label_names = None if label_names is None else list(label_names)
    return model


class TimmModel(ModelSource):
    """A timm Vision Transformer, pretrained or from scratch. Arguments left out keep the architecture's own value.

    Args:
        architecture: As in ``timm.list_models()``, e.g. ``vit_base_patch16_224`` or ``deit_small_patch16_224``.
        pretrained: Download the architecture's pretrained weights.
        checkpoint_path: Local file with pretrained weights.
        img_size: Height and width of the input, pixels.
        patch_size: Height and width of a patch, pixels.
        in_chans: Channels of the input.
        embed_dim: ``d_model``.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: ``d_ff / d_model``.
        drop_path_rate: Stochastic depth.
        proj_drop_rate: Dropout after projections and inside FFNs.

    Raises:
        ConfigError: If timm has no such architecture.
    """

    def __init__(
        self,
        architecture: str,
        pretrained: bool = False,
        checkpoint_path: str = "",
        img_size: int | None = None,
        patch_size: int | None = None,
        in_chans: int | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        drop_path_rate: float | None = None,
        proj_drop_rate: float | None = None,
    ) -> None:
        check(
            timm.is_model(architecture),
            f"architecture={architecture!r}: timm has no such model; allowed are e.g. "
            + ", ".join(difflib.get_close_matches(architecture, timm.list_models(["vit_*", "deit*"]), cutoff=0.1)),
        )
        self.architecture = architecture
        self.pretrained = pretrained
        self.checkpoint_path = checkpoint_path
        given = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "drop_path_rate": drop_path_rate,
            "proj_drop_rate": proj_drop_rate,
        }
        self.model_args = {key: value for key, value in given.items() if value is not None}

    def build(self, label_names: Sequence[str]) -> nn.Module:
        return _create(
            self.architecture,
            len(label_names),
            self.model_args,
            label_names,
            pretrained=self.pretrained,
            checkpoint_path=self.checkpoint_path,
        )

    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        with torch.device("meta"):
            return _create(self.architecture, len(label_names), self.model_args, label_names)


ADAPTER = TimmViTAdapter()
