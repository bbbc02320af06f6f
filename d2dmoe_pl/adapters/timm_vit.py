"""timm Vision Transformers, DeiT among them: the FFN is the ``mlp`` of each block."""

from typing import Any

from timm.layers import Attention
from timm.models import VisionTransformer

from d2dmoe_pl.adapters._attention import AttentionParts, Projection
from d2dmoe_pl.adapters._timm import FFN_CLASSES, TimmAdapter
from d2dmoe_pl.errors import check


class TimmViTAdapter(TimmAdapter):
    """See :class:`TimmAdapter`."""

    family = "timm_vit"
    title = "timm ViT, DeiT"
    model_classes = (VisionTransformer,)
    attention = AttentionParts((Attention,), fused="qkv", output="proj")

    def matches(self, model: Any) -> bool:
        return super().matches(model) and not any(map(_is_other_ffn, getattr(model, "blocks", ())))

    def projections(self, model: Any) -> list[Projection]:
        for name, block in model.blocks.named_children():
            attention = getattr(block, "attn", None)
            check(
                isinstance(attention, Attention) and getattr(attention, "gate", None) is None,
                f"blocks.{name}: its attention is gated or no plain one, and its projections cannot be taken apart",
            )
        return super().projections(model)


def _is_other_ffn(block: Any) -> bool:
    """Whether the FFN of a block is of another class of timm than those known, so that it is found by tracing."""
    mlp = getattr(block, "mlp", None)
    return type(mlp).__module__.startswith("timm.") and not isinstance(mlp, FFN_CLASSES)


ADAPTER = TimmViTAdapter()
