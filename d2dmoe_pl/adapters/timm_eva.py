"""timm EVA, EVA02 and DINOv3: the FFN, gated in some, is the ``mlp`` of each block."""

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._timm import TimmAdapter


def _replaceable(attention: EvaAttention | AttentionRope) -> tuple[str, ...]:
    if attention.qkv is None:
        return ("query", "key", "value", "output")
    is_called = getattr(attention, "q_bias", None) is None or attention.qkv_bias_separate
    return ("fused", "output") if is_called else ("output",)


class TimmEvaAdapter(TimmAdapter):
    """See :class:`TimmAdapter`.

    Where biases of queries and values are kept beside the fused module, attention takes its weights and does not call
    it: its output alone becomes experts.
    """

    family = "timm_eva"
    title = "timm EVA, EVA02, DINOv3"
    model_classes = (Eva,)
    takes_activation = False
    attention = AttentionParts(
        (EvaAttention, AttentionRope),
        fused="qkv",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="proj",
        replaceable=_replaceable,
    )


ADAPTER = TimmEvaAdapter()
