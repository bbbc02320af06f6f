"""Any other model of timm: its FFNs are found by tracing."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from d2dmoe_pl.adapters._adapter import place_meta_buffers_
from d2dmoe_pl.adapters._ffn import FFN
from d2dmoe_pl.adapters._structural import StructuralAdapter
from d2dmoe_pl.adapters._timm import TimmAdapter, cast_as_weights_, recorded_args


class AnyTimmAdapter(StructuralAdapter, TimmAdapter):
    """See :class:`StructuralAdapter`."""

    family = "any_timm"
    title = "any other of timm"
    takes_activation = False

    def matches(self, model: Any) -> bool:
        return type(model).__module__.startswith("timm.") and hasattr(model, "pretrained_cfg")

    def examples(self, model: Any) -> Sequence[Mapping[str, Tensor]]:
        return [self.random_inputs(model, size, 0) for size in (2, 3)]

    def input_shape(self, model: Any) -> tuple[int, int, int]:
        channels, *usual = model.pretrained_cfg["input_size"]
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        args = recorded_args(model) or {}  # which are needed to save it, not to see it run
        size = args.get("img_size") or own or usual
        height, width = (size, size) if isinstance(size, int) else size
        return args.get("in_chans", channels), height, width

    def logits_and_hidden_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`Adapter.logits_and_hidden_states`; there are none."""
        return self.logits(model, batch), ()

    def _put_activation_(self, model: Any, ffns: Sequence[FFN], activation: Any) -> None:
        for ffn in ffns:
            self.put_activation_(model, ffn, activation())

    def fill_buffers_(self, model: Any) -> None:
        names = [name for name, buffer in model.named_buffers(remove_duplicate=False) if buffer.is_meta]
        made: Any = self.rebuild(model) if names else None  # not every architecture has a way of its own
        filled = place_meta_buffers_(model)
        for name in names:
            model.get_buffer(name).copy_(made.get_buffer(name))
        for module in filled:
            cast_as_weights_(model, module)


ADAPTER = AnyTimmAdapter()
