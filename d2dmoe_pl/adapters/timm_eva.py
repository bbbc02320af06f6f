"""timm EVA, EVA02 and DINOv3: the FFN, gated in some, is the ``mlp`` of each block."""

from timm.models.eva import Eva, EvaAttention

from d2dmoe_pl.adapters._attention import AttentionParts
from d2dmoe_pl.adapters._timm import TimmAdapter


class TimmEvaAdapter(TimmAdapter):
    """See :class:`TimmAdapter`.

    Of attention's projections it names the output: biases of queries and values are kept beside the fused module.
    """

    family = "timm_eva"
    title = "timm EVA, EVA02, DINOv3"
    model_classes = (Eva,)
    takes_activation = False
    attention = AttentionParts((EvaAttention,), output="proj")


ADAPTER = TimmEvaAdapter()
