"""timm Vision Transformers as the start of a run."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

from d2dmoe_pl.adapters._adapter import ModelSource
from d2dmoe_pl.errors import check


def create_timm_model(
    architecture: str, num_classes: int, model_args: dict[str, Any], label_names: Sequence[str] | None, **kwargs: Any
) -> nn.Module:
    """A timm model that remembers how it was made: ``model_args`` and ``label_names`` are its attributes."""
    model: Any = timm.create_model(architecture, num_classes=num_classes, **model_args, **kwargs)
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
        return create_timm_model(
            self.architecture,
            len(label_names),
            self.model_args,
            label_names,
            pretrained=self.pretrained,
            checkpoint_path=self.checkpoint_path,
        )

    def build_structure(self, label_names: Sequence[str]) -> nn.Module:
        with torch.device("meta"):
            return create_timm_model(self.architecture, len(label_names), self.model_args, label_names)
