"""timm Vision Transformers, DeiT among them: the FFN is the ``mlp`` of each block."""

from typing import Any

from timm.layers import Attention
from timm.models import VisionTransformer

from d2dmoe_pl.adapters._attention import AttentionParts, Projection
from d2dmoe_pl.adapters._timm import TimmAdapter
from d2dmoe_pl.errors import check


class TimmViTAdapter(TimmAdapter):
    """See :class:`TimmAdapter`."""

    family = "timm_vit"
    title = "timm ViT, DeiT"
    model_classes = (VisionTransformer,)
    attention = AttentionParts((Attention,), fused="qkv", output="proj")

    def projections(self, model: Any) -> list[Projection]:
        for name, block in model.blocks.named_children():
            attention = getattr(block, "attn", None)
            check(
                isinstance(attention, Attention) and getattr(attention, "gate", None) is None,
                f"blocks.{name}: its attention is gated or no plain one, and its projections cannot be taken apart",
            )
        return super().projections(model)


ADAPTER = TimmViTAdapter()
